"""Text in, `PreferenceBatch` out."""
