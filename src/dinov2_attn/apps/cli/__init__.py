"""The subcommands, one module each: ``add(subparsers)`` declares it, ``run(args)`` does it."""
