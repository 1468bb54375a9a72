"""How long tests wait.

A wait ends with what is waited for, so a long limit costs nothing where all is well; and a short one makes a test
depend on how busy the machine is: beside four busy loops on two cores a stall of some seconds is usual.
"""

PATIENCE = 60.0  # seconds that a test waits for something which should have come at once
