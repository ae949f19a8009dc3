"""`tools/gpu_check.py`: what can be proven on the GPU that is here, step by step, each in a process of its own.

steps: the list; runner: order, needs, time; report: table and JSON; findings: what a step hands back. The other modules
hold the steps' functions and are imported in the steps' own processes.
"""
