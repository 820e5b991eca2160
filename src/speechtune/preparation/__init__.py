"""Raw recordings -> clips with texts, ready for training, and a verdict on them."""
