"""All that speaks to the kernel: rtnetlink (observe, apply, monitor), packet filter rules, sysctls, interfaces.

Each part is a `driver.Driver`: it observes what is of its kinds of object, and puts and deletes them.
"""
