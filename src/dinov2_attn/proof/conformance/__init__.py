"""The conformance suite: proves this package's promises on any copy of DINOv2's code.

::

    pytest --pyargs dinov2_attn.conformance --dinov2 PATH
    pytest --pyargs dinov2_attn.conformance --dinov2 PATH --package moge.model.dinov2

``PATH`` is what holds the package: a checkout, a ``site-packages`` folder, a wheel. It needs
pytest and what the code at hand needs, runs on the CPU, and downloads nothing. What cannot
be proved on the code at hand is skipped; ``-rs`` says why.

===============  ===============================================================
test_install     the code is recognised, grafted, and put back as it was
test_unasked     not asked, everything is bit for bit what it was
test_faithful    ``proj(weights @ v)`` is the module's own output
test_rows        rows are distributions, and causal ones see no later key
test_selection   a subset of queries is the slice, the mean of heads the mean
test_agreement   every way of asking gives the same attention, up to rounding
test_layout      the order of tokens: CLS, registers, patches row by row
test_channels    a channel of many has the attention that it has alone
test_nested      lists of tensors, with xFormers and without
===============  ===============================================================
"""
