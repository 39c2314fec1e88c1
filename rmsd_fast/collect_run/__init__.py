"""Parts of `rmsd_fast.collect`: settings, requests, replies, flow control, the pool file and the loop."""
