"""``python -m dinov2_attn``: the command line without its script."""

from dinov2_attn.apps.cli.main import main

raise SystemExit(main())
