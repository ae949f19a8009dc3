"""`r1mega plan`: memory and seconds of every phase of a stage on a cluster, before a process starts."""
