"""The interactive page: one HTML file with the photograph, the weights and all that shows them.

>>> from dinov2_attn.apps.explorer.write import write_page
>>> write_page("page.html", photograph.picture, maps, title="cat.jpg")
"""
