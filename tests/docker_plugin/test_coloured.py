"""Docker networks in the several networks of one flanneld."""

from support.engine import until


def test_a_docker_network_in_a_named_one(coloured):
    h1 = coloured[0]
    h1.network("bad", refused="choose one of blue, green by --ipam-opt network=NAME")
    for engine in coloured:
        engine.network("blue", "--ipam-opt", "network=blue", "--opt", "network=blue")
        engine.network("green", "--opt", "network=green", "--subnet", "10.7.200.0/22")
    addresses = {
        f"{network}{number}": engine.start(f"{network}{number}", network)
        for number, engine in enumerate(coloured, 1)
        for network in ("blue", "green")
    }
    assert addresses["blue1"].startswith("10.6.")
    assert addresses["green2"].startswith("10.7.20")
    for network in ("blue", "green"):
        mine = {addresses[f"{network}1"], addresses[f"{network}2"]}
        until(lambda network=network: h1.reaches(f"{network}1", addresses[f"{network}2"]), "the network works")
        for number, engine in enumerate(coloured, 1):
            assert engine.reached(f"{network}{number}", addresses.values()) == mine
    for engine in coloured:
        engine.sh("docker ps -aq | xargs -r docker rm -f; docker network rm blue green")
        assert engine.left_behind() == []
