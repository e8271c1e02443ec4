"""The CNI plugin `flannel` (compatibility reference, section 10): reads subnet.env, and has `bridge` and `host-local` do the work.

A runtime starts the plugin once for every container that comes or goes, so its start is what counts. It runs under
`python -IS` and imports `os`, `sys` and this package, nothing else: no json (which takes as long to import as Python to
start), no typing, no dataclasses. What only GC, STATUS and repair need is imported there.

    main        what the runtime asked for: environment, standard input, answer
    netconf     the network config, and the delegate's config made of it. Pure
    subnetenv   subnet.env, as the daemon writes it
    state       what ADD leaves for DEL, CHECK and GC
    delegate    find and run the delegate
    commands    ADD, DEL, CHECK
    collect     GC;  status: STATUS;  leases: host-local's files
"""
