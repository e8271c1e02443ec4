/* The yardstick for the udp backend: a proxy as flannel's, one packet for each system call.
 *
 *     one_packet_proxy DEVICE PORT NETWORK/LENGTH=PEER [NETWORK/LENGTH=PEER ...]
 *
 * Packets that the kernel routes into the TUN device DEVICE go, bare, as the payload of UDP datagrams to the host whose
 * network holds their destination, and those that arrive on PORT go into the device. Either way the TTL falls by one and
 * the header's checksum is patched. While either side gives packets there is no poll() between them. It opens no offload
 * of the device and of the socket, as flannel's does not: a packet is at most the device's MTU long.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_ROUTES 256

struct route {
    uint32_t network, mask; /* network byte order */
    struct sockaddr_in peer;
};

static struct route routes[MOST_ROUTES];
static int route_count;
static char packet[65536];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int open_device(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);

    if (tun < 0) fail("/dev/net/tun");
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(tun, TUNSETIFF, &request)) fail("TUNSETIFF");
    return tun;
}

static int open_socket(int port)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(port)};
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

    if (sock < 0 || bind(sock, (struct sockaddr *)&own, sizeof own)) fail("socket");
    return sock;
}

static void add_route(char *text, int port)
{
    char *slash = strchr(text, '/'), *equals = strchr(text, '=');
    struct route *route = &routes[route_count];
    int length = slash ? atoi(slash + 1) : -1;

    if (!slash || !equals || length < 1 || length > 32 || route_count == MOST_ROUTES) {
        fprintf(stderr, "%s: write NETWORK/LENGTH=PEER\n", text);
        exit(2);
    }
    *slash = 0;
    route->mask = htonl(~0u << (32 - length));
    route->network = inet_addr(text) & route->mask;
    route->peer = (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = inet_addr(equals + 1)};
    route_count++;
}

static const struct route *find_route(uint32_t destination)
{
    for (int i = 0; i < route_count; i++)
        if ((destination & routes[i].mask) == routes[i].network) return &routes[i];
    return NULL;
}

/* One hop less to live; 0: none is left. The checksum changes by as much as the word with the TTL in it (RFC 1141). */
static int decrement_ttl(struct iphdr *header)
{
    uint32_t sum;

    if (header->ttl <= 1) return 0;
    header->ttl--;
    sum = header->check + htons(0x0100);
    header->check = sum + (sum >= 0xffff);
    return 1;
}

static int device_to_socket(int tun, int sock)
{
    ssize_t length = read(tun, packet, sizeof packet);
    struct iphdr *header = (void *)packet;
    const struct route *route;

    if (length < 0) return 0;
    if (length < (ssize_t)sizeof *header || header->version != 4) return 1;
    route = find_route(header->daddr);
    if (route && decrement_ttl(header))
        while (sendto(sock, packet, length, 0, (const struct sockaddr *)&route->peer, sizeof route->peer) < 0 &&
               errno == EAGAIN) {
            struct pollfd room = {sock, POLLOUT, 0};
            poll(&room, 1, 100);
        }
    return 1;
}

static int socket_to_device(int tun, int sock)
{
    ssize_t length = recv(sock, packet, sizeof packet, 0);
    struct iphdr *header = (void *)packet;

    if (length < 0) return 0;
    if (length >= (ssize_t)sizeof *header && header->version == 4 && decrement_ttl(header))
        if (write(tun, packet, length) < 0 && errno != EINVAL && errno != EIO && errno != EAGAIN) fail("write");
    return 1;
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: one_packet_proxy DEVICE PORT NETWORK/LENGTH=PEER...\n");
        return 2;
    }
    int tun = open_device(argv[1]), sock = open_socket(atoi(argv[2]));
    struct pollfd both[2] = {{tun, POLLIN, 0}, {sock, POLLIN, 0}};

    for (int i = 3; i < argc; i++) add_route(argv[i], atoi(argv[2]));
    puts("ready");
    fflush(stdout);
    for (;;) {
        if (poll(both, 2, -1) < 0 && errno != EINTR) fail("poll");
        while (device_to_socket(tun, sock) + socket_to_device(tun, sock))
            ;
    }
}
