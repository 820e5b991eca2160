"""What happens to an adapter after training: verify, extract, convert, merge, push."""
