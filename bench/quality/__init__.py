"""What methods do to pictures, on the embedded model."""
