"""Pictures and their labels: read, drawn, checked and augmented, before any network sees them."""
