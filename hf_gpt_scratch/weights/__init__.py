"""Everything that moves weights: files of every format, conversion, publishing, parity."""
