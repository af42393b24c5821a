"""One self-contained HTML page about a run: no script, no network, every figure a table too."""
