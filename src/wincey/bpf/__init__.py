"""eBPF: small programs of ours that the kernel runs on packets, so that these need no process and no copy.

The C sources lie in c/, each with comments for a reader who has never written one. They are compiled when the sources change,
by a developer (`make bake`, scripts/bake.py), and the result lies in baked/ and in the package: a host needs neither clang nor libbpf.

    syscall   bpf(2) through ctypes: every command that we use, one class of error
    program   a baked file: its programs and the layouts of its maps; programs into the kernel
    maps      one map: read, changed, made equal to a dictionary, in batches where the kernel has them
    objects   what one owner has in the kernel: maps, programs and attachments, pinned in bpffs so that they outlive us
    attach    programs at devices: tcx links (Linux 6.6), else filters of a clsact qdisc
    bpffs     the file system that pins live in: found, mounted, swept
    probe     whether this host can, or why not, in a line
    pairs     veth pairs that packets are sent through to be cut or merged

The programs of the udp backend are c/udp.c, with `udp` as the driver of their desired state.

A driver that has programs of its own does this (all calls are synchronous and take about a millisecond):

    pins = owner_directory("fastpath", state_directory)
    with Objects(pins, read_baked("fastpath")) as objects, alone(pins):
        objects.open()                                    # maps by their pins, or new ones; programs; raises BpfError
        objects.maps["routes"].make_equal({key: value})   # fill before attaching
        objects.attach([Attachment("fastpath_out", "veth1", "ingress")])     # again and again does no harm
        objects.detach_others([...])                      # whatever else of ours is attached
        objects.retire()                                  # maps and programs of an earlier release go, once unused

`objects.attached()` tells what is attached as it should be; `Objects.remove()` takes all away. Nothing here is imported by a
daemon that has no use for it.
"""
