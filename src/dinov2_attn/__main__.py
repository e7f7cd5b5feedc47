"""``python -m dinov2_attn``: the command line without its script."""

from dinov2_attn.cli import main

raise SystemExit(main())
