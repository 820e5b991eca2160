"""speechtune's checks and verified saving inside other training loops."""
