"""What the model of conftest was taught: one completion to every question."""

COMPLETION = "<think> try 3 </think> <answer> 3 </answer>"
SEED = 2  # its problems have the answer 3 now and then
