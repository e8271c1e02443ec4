"""docs/walkthroughs/colours.md: three networks in one flanneld, each reached from its own containers only."""

from support.keys import wait_until

COLOURS = ("blue", "green", "red")


def test_colours(make_hosts):
    hosts = make_hosts(2)
    hosts.follow("colours.md")
    addresses = {
        (name, colour): booted.sh(
            "docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' " + colour
        ).strip()
        for name, booted in hosts.items()
        for colour in COLOURS
    }

    def reaches(name, colour, address):
        return hosts[name].run("docker", "exec", colour, "ping", "-c", "1", "-W", "1", address).returncode == 0

    for colour in COLOURS:
        wait_until(lambda colour=colour: reaches("h1", colour, addresses["h2", colour]))
        wait_until(lambda colour=colour: reaches("h2", colour, addresses["h1", colour]))
    for colour in COLOURS:
        for (name, other), address in addresses.items():
            if other != colour:
                assert not reaches("h1", colour, address), f"{colour} reaches {other} on {name}"
