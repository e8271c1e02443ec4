"""Bad days on purpose: faults on real parts, with packets flowing all the while. `wincey lab chaos` runs them.

A scenario (scenario.py) is a name, a sentence and a fault: a context manager that puts it and takes it away again. Each runs
in a world of its own (world.py): hosts with daemons and containers, and a cluster of three etcd servers on hosts of their own
(etcd.py). While it runs, every pair of containers exchanges echo requests and a little TCP (traffic.py); afterwards the daemons
themselves are asked whether all is as wanted again, and a new lease has to reach each of them (healing.py). run.py puts these
together, and judges. The scenarios are in one file for each family, faults_*.py, and in the table of catalogue.py.
"""
