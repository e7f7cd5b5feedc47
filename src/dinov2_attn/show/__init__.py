"""Pictures of attention: photographs in, heatmaps and overlays out."""
