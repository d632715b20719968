"""What differs by device: attention and sampling, torch everywhere."""
