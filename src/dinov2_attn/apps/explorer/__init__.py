"""The interactive page: one HTML file with the image, its attention weights and the controls.

>>> from dinov2_attn import viz
>>> image = viz.load_image("cat.jpg", model)
>>> viz.explore(model, image, "page.html", title="cat.jpg")
"""
