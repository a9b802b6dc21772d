import subprocess
import sys

SERVE = """
import gc, sys, weakref
from gateway.engine.interpreter import favour_steps

class Node: pass

favour_steps()
assert sys.getswitchinterval() < 0.001, sys.getswitchinterval()
assert gc.get_freeze_count() > 0
node = Node()
node.itself = node
gone = weakref.ref(node)
del node
gc.collect()
assert gone() is None, "garbage that comes later is still collected"
"""


def test_a_serving_process_shares_the_lock_often_and_leaves_what_stays_alone() -> None:
    subprocess.run([sys.executable, "-c", SERVE], check=True, timeout=240)
