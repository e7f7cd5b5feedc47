"""The conformance suite: tests the guarantees of this package on any copy of DINOv2's code.

::

    pytest --pyargs dinov2_attn.conformance --dinov2 PATH
    pytest --pyargs dinov2_attn.conformance --dinov2 PATH --package moge.model.dinov2

``PATH`` holds the package: a checkout, a ``site-packages`` folder or a wheel. The suite needs
pytest and the dependencies of the tested code. It runs on the CPU and downloads nothing. Tests
that do not apply to the tested code are skipped; ``-rs`` shows the reasons.

- ``test_install``: the code is recognised, grafted and restored.
- ``test_bit_identity``: outputs without attention are unchanged, bit for bit.
- ``test_faithful``: ``proj(weights @ v)`` is the module's own output.
- ``test_rows``: rows are distributions, and causal rows have no later keys.
- ``test_selection``: selected queries are a slice, and the mean of heads is the mean.
- ``test_agreement``: all functions return the same attention, up to rounding.
- ``test_layout``: the order of tokens is CLS, registers, patches row by row.
- ``test_channels``: a channel of several has the same attention as the channel alone.
- ``test_nested``: lists of tensors, with and without xFormers.
"""
