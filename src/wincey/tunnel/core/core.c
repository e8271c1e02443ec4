/* The loop, and what else Python calls; see core.h. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>

#define GATHER 20000		/* nanoseconds */

_Static_assert(sizeof(struct vnet) == VNET, "as the kernel lays it out");
_Static_assert(ARENA >= (FRAMES + 1) * FRAME, "one arena for both directions");

static const char *const names[COUNTERS] = {
	"out.packets", "out.bytes", "in.packets", "in.bytes",
	"out.drop.short", "out.drop.version", "out.drop.header", "out.drop.length", "out.drop.no-peer", "out.drop.offload",
	"in.drop.short", "in.drop.version", "in.drop.header", "in.drop.length", "in.foreign-source", "in.unknown-source",
	"in.drop.source",
	"out.sends", "in.writes",
};

EXPORT int wincey_abi(void) { return ABI; }

EXPORT struct core *wincey_new(void)
{
	struct core *core = calloc(1, sizeof *core);

	if (!core)
		return NULL;
	core->arena = malloc(ARENA);
	if (!core->arena || peers_set(&core->peers, NULL, 0)) {
		free(core->arena);
		free(core);
		return NULL;
	}
	core->reads = READS;
	core->datagrams = DATAGRAMS;
	prctl(PR_SET_TIMERSLACK, 1000);	/* of this process, which sleeps for a GATHER only */
	return core;
}

EXPORT void wincey_free(struct core *core)
{
	peers_free(&core->peers);
	free(core->arena);
	free(core);
}

/* Peers, 9 bytes each. 0 or -errno. */
EXPORT int wincey_peers(struct core *core, const uint8_t *records, size_t count) { return peers_set(&core->peers, records, count); }

/* How to work. port: of the peers, in host byte order. trains: the kernel has UDP_SEGMENT. tcp, udp: what the device takes
 * merged. check: enum check. network, length: the cluster's, as it stands in packets. */
EXPORT void wincey_set(struct core *core, int port, int trains, int tcp, int udp, int check, const uint8_t *network, int length)
{
	core->port = htons((uint16_t)port);
	core->trains = trains != 0;
	core->merge_tcp = tcp != 0;
	core->merge_udp = udp != 0;
	core->check = (uint8_t)check;
	core->network_mask = length > 0 ? htonl(~(uint32_t)0 << (32 - length)) : 0;
	memcpy(&core->network, network, 4);
	core->network &= core->network_mask;
	for (uint32_t i = 0; i < core->peers.count; i++)
		core->peers.endpoints[i].limit = DATAGRAM;
}

/* A flood of small packets wakes us for each of them, at the cost of whoever sends them, often on the same processor. So
 * when several went out, fast, and none came in, the next ones are given a moment to gather. Requests and answers never wait:
 * between two of them something comes in. */
static void gather(struct core *core)
{
	struct timespec now;
	uint64_t moment;

	if (core->streak < STREAK)
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	moment = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	if (moment - core->moment < 2 * GATHER) {
		nanosleep(&(struct timespec){.tv_nsec = GATHER}, NULL);
		moment += GATHER;
	}
	core->moment = moment;
}

/* Forward until anything else in `epoll` than the device and the socket is ready, a packet is to be refused, or a signal
 * comes. 0, or -errno when the device is gone. */
EXPORT int wincey_forward(struct core *core, int epoll, int tun, int udp)
{
	struct epoll_event ready[4];
	int count, told = 0, result;

	while (!told && !core->refused) {
		count = epoll_wait(epoll, ready, 4, -1);
		if (count < 0)
			return errno == EINTR ? 0 : -errno;
		for (int i = 0; i < count; i++) {
			if (ready[i].data.fd == tun)
				result = wincey_outbound(core, tun, udp);
			else if (ready[i].data.fd == udp)
				result = wincey_inbound(core, tun, udp);
			else
				result = 0, told = 1;
			if (result)
				return result;
		}
		gather(core);
	}
	return 0;
}

/* Take the packet that nobody has, as much as fits: its length, 0 when there is none. */
EXPORT int wincey_refused(struct core *core, uint8_t *packet, int size)
{
	int length = (int)core->refused < size ? (int)core->refused : size;

	memcpy(packet, core->refusal, (size_t)length);
	core->refused = 0;
	return length;
}

/* Name and value of a counter, in order; NULL after the last one. Failures come after them, see wincey_failure. */
EXPORT const char *wincey_counter(const struct core *core, int index, uint64_t *value)
{
	if (index < 0 || index >= COUNTERS)
		return NULL;
	*value = core->counters[index];
	return names[index];
}

/* Packets that failed with an errno: what 0 is on the way out, 1 on the way in, 2 errors that the socket reported. */
EXPORT uint64_t wincey_failure(const struct core *core, int what, int error)
{
	return what >= 0 && what < FAILURES && error >= 0 && error < ERRNOS ? core->failures[what][error] : 0;
}
