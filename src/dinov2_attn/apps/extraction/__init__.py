"""The attention of whole datasets: images in, shards of maps with an index out, and back."""
