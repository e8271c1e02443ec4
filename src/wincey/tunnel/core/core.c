/* System calls, batches and the loop; see core.h.
 *
 * A call moves a batch at most. What is dropped is counted by direction and reason; no error of a send ends anything: the
 * tunnel is a link, and links drop. A packet that nobody has is kept for Python to answer, which is why the loop returns.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103		/* include/uapi/linux/udp.h */
#define UDP_GRO 104
#endif

#define EXPORT __attribute__((visibility("default")))	/* all else stays inside: the build hides it */

#define FRAME (VNET + PACKET)	/* the most that a read of the device gives */
#define FRAMES 8		/* large packets of one batch; more small ones */
#define READS 64
#define GATHER 20000		/* nanoseconds */
#define DATAGRAMS 16		/* each up to a whole train */
#define RECEIVE (PACKET + 1)
#define ARENA (DATAGRAMS * RECEIVE + VNET)

_Static_assert(sizeof(struct vnet) == VNET, "as the kernel lays it out");
_Static_assert(ARENA >= (FRAMES + 1) * FRAME, "one arena for both directions");

static const char *const names[COUNTERS] = {
	"out.packets", "out.bytes", "in.packets", "in.bytes",
	"out.drop.short", "out.drop.version", "out.drop.header", "out.drop.length", "out.drop.no-peer", "out.drop.offload",
	"in.drop.short", "in.drop.version", "in.drop.header", "in.drop.length", "in.foreign-source", "in.unknown-source",
	"in.drop.source",
	"out.sends", "in.writes",
};

static void failed(struct core *core, enum failure what, int error, unsigned packets)
{
	core->failures[what][error > 0 && error < ERRNOS ? error : 0] += packets;
}

/* Why this is not one whole IPv4 packet: the counter, as an offset from `..._SHORT`; -1 when it is. */
static int fault(const uint8_t *packet, size_t length)
{
	uint32_t header;

	if (length < 20)
		return 0;
	if (packet[0] >> 4 != 4)
		return 1;
	header = (packet[0] & 15) * 4;
	if (header < 20 || header > length)
		return 2;
	return get16(packet + 2) == length ? -1 : 3;
}

/* --- out ---------------------------------------------------------------------------------------------------------- */

static void sent(struct core *core, const struct train *train)
{
	core->counters[OUT_PACKETS] += train->segments;
	core->counters[OUT_BYTES] += train->bytes;
	core->counters[OUT_SENDS]++;
}

/* A train that the kernel refused, one datagram for each segment. */
static void send_singly(struct core *core, const struct train *train, struct sockaddr_in *to, int udp)
{
	struct iovec *iov = &core->out.iov[train->first];

	for (unsigned i = 0; i < train->segments; iov += train->parts[i++]) {
		struct msghdr message = {.msg_name = to, .msg_namelen = sizeof *to, .msg_iov = iov, .msg_iovlen = train->parts[i]};
		ssize_t length = sendmsg(udp, &message, MSG_DONTWAIT);

		if (length < 0) {
			failed(core, OUT_DROP, errno, 1);
			continue;
		}
		core->counters[OUT_PACKETS]++;
		core->counters[OUT_BYTES] += (uint64_t)length;
		core->counters[OUT_SENDS]++;
	}
}

/* Send all trains that are ready, and empty `out`. */
static void send_trains(struct core *core, int udp)
{
	struct out *out = &core->out;
	struct mmsghdr messages[TRAINS];
	struct sockaddr_in to[TRAINS];
	union { char space[CMSG_SPACE(sizeof(uint16_t))]; struct cmsghdr align; } control[TRAINS];
	unsigned i;

	if (out->iovs == 1) {	/* one packet alone: the cheapest call */
		to[0] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = core->port,
					     .sin_addr.s_addr = out->train[0].to->address};
		if (sendto(udp, out->iov[0].iov_base, out->iov[0].iov_len, MSG_DONTWAIT, (void *)&to[0], sizeof to[0]) < 0)
			failed(core, OUT_DROP, errno, 1);
		else
			sent(core, &out->train[0]);
		out->trains = out->iovs = out->segments = 0;
		return;
	}
	for (i = 0; i < out->trains; i++) {
		struct train *train = &out->train[i];
		struct msghdr *message = &messages[i].msg_hdr;

		to[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = core->port, .sin_addr.s_addr = train->to->address};
		*message = (struct msghdr){.msg_name = &to[i], .msg_namelen = sizeof to[i],
					   .msg_iov = &out->iov[train->first], .msg_iovlen = train->iovs};
		if (train->segments > 1) {
			uint16_t size = (uint16_t)train->size;
			struct cmsghdr *header;

			memset(&control[i], 0, sizeof control[i]);
			message->msg_control = &control[i];
			message->msg_controllen = sizeof control[i].space;
			header = CMSG_FIRSTHDR(message);
			header->cmsg_level = IPPROTO_UDP;
			header->cmsg_type = UDP_SEGMENT;
			header->cmsg_len = CMSG_LEN(sizeof size);
			memcpy(CMSG_DATA(header), &size, sizeof size);
		}
	}
	for (i = 0; i < out->trains;) {
		int done = sendmmsg(udp, &messages[i], out->trains - i, MSG_DONTWAIT);
		int error = errno;
		struct train *train = &out->train[i];

		if (done > 0) {
			for (; done; done--)
				sent(core, &out->train[i++]);
			continue;
		}
		if (done < 0 && error == EINTR)
			continue;
		if (train->segments > 1 && (error == EIO || error == EINVAL || error == EMSGSIZE)) {
			if (error == EIO)
				core->trains = 0;	/* a device, or an IPsec policy, that can't have it at all */
			else
				train->to->limit = train->size - 1;	/* larger than the way there takes in one piece */
			send_singly(core, train, &to[i], udp);
		} else {
			failed(core, OUT_DROP, error, train->segments);
		}
		i++;
	}
	out->trains = out->iovs = out->segments = 0;
}

/* One frame from the device. */
static void leave(struct core *core, uint8_t *frame, size_t length, int udp)
{
	struct vnet vnet;
	uint8_t *packet = frame + VNET;
	struct endpoint *to;
	uint32_t destination;
	int wrong;

	if (length < VNET) {
		core->counters[OUT_SHORT]++;
		return;
	}
	length -= VNET;
	memcpy(&vnet, frame, VNET);
	if ((wrong = fault(packet, length)) >= 0) {
		core->counters[OUT_SHORT + wrong]++;
		return;
	}
	memcpy(&destination, packet + 16, 4);
	if (!(to = peers_route(&core->peers, destination))) {
		core->counters[OUT_NO_PEER]++;
		if (!core->refused) {
			core->refused = length < sizeof core->refusal ? (uint32_t)length : sizeof core->refusal;
			memcpy(core->refusal, packet, core->refused);
		}
		return;
	}
	if (vnet.gso_type != GSO_NONE) {
		if (out_large(core, packet, length, &vnet, to, send_trains, udp))
			core->counters[OUT_OFFLOAD]++;
	} else if (vnet.flags & NEEDS_CSUM && finish_checksum(packet, length, &vnet)) {
		core->counters[OUT_OFFLOAD]++;
	} else {
		out_packet(core, packet, length, to, send_trains, udp);
	}
}

#define STREAK 4	/* packets one way and none the other: no request and its answer */

/* How many packets to ask for next time: as many as there were, and more when there were all and it looks like many. One at a
 * time, as of a request and its answer, then costs no call that finds nothing. */
static uint32_t next_batch(uint32_t made, uint32_t limit, uint32_t most, int many)
{
	if (made < limit)
		return made ? made : 1;
	if (!many)
		return limit;
	return limit * 4 < most ? limit * 4 : most;
}

/* Send what the device has, at most a batch, and until a packet is to be refused. 0, or -errno when the device is gone. */
EXPORT int wincey_outbound(struct core *core, int tun, int udp)
{
	size_t used = 0;
	uint32_t reads = 0;
	int result = 0;

	while (reads < core->reads && used < FRAMES * (size_t)FRAME && !core->refused) {
		ssize_t length = read(tun, core->arena + used, FRAME);

		if (length <= 0) {
			if (length < 0 && errno != EAGAIN && errno != EINTR)
				result = -errno;
			break;
		}
		leave(core, core->arena + used, (size_t)length, udp);
		used += ((size_t)length + 63) & ~(size_t)63;
		reads++;
	}
	send_trains(core, udp);
	core->streak = reads * 256 > used ? core->streak + reads : 0;
	core->inward = 0;
	core->reads = next_batch(reads, core->reads, READS, core->streak >= STREAK || used > 4096);
	return result;
}

/* --- in ----------------------------------------------------------------------------------------------------------- */

/* Whether a packet may come from this host of the underlay; see relay.py, which has the reasons. */
static int admitted(struct core *core, const uint8_t *packet, uint32_t host)
{
	uint32_t source;
	struct endpoint *owner;

	memcpy(&source, packet + 12, 4);
	owner = peers_route(&core->peers, source);
	if (owner && owner->address == host)
		return 1;
	if (!peers_host(&core->peers, host)) {
		core->counters[IN_UNKNOWN]++;
		return 1;
	}
	if (core->check == CHECK_STRICT
	    || (core->check == CHECK_NETWORK && (owner || (source & core->network_mask) == core->network))) {
		core->counters[IN_DROP_SOURCE]++;
		return 0;
	}
	core->counters[IN_FOREIGN]++;
	return 1;
}

/* Write `count` pieces that are `packets` packets. 0, or -errno when the device is gone, or 1 when it takes no such thing. */
static int write_pieces(struct core *core, int tun, const struct iovec *iov, uint32_t count, uint32_t packets, uint64_t bytes)
{
	ssize_t length;

	do
		length = writev(tun, iov, (int)count);
	while (length < 0 && errno == EINTR);
	if (length < 0) {
		if (errno == EBADFD || errno == EBADF)
			return -errno;
		if (errno == EINVAL && packets > 1)
			return 1;
		failed(core, IN_DROP, errno, packets);
		return 0;
	}
	core->counters[IN_PACKETS] += packets;
	core->counters[IN_BYTES] += bytes;
	core->counters[IN_WRITES]++;
	return 0;
}

static int write_one(struct core *core, int tun, const uint8_t *packet, size_t length)
{
	static const uint8_t none[VNET];

	return write_pieces(core, tun, (struct iovec[]){{(void *)none, VNET}, {(void *)packet, length}}, 2, 1, length);
}

/* Write the large packet in the making, if there is one. The packets of it lie whole in the arena, each before its payload. */
static int write_merged(struct core *core, int tun)
{
	struct merge *merge = &core->merge;
	uint32_t count = merge->count, pieces;
	int result;

	if (!count)
		return 0;
	pieces = merge_finish(merge);
	merge->count = 0;
	result = write_pieces(core, tun, merge->iov, pieces, count, merge->payload + (uint64_t)count * merge->header);
	if (result <= 0)
		return result;
	if (merge->first[9] == IPPROTO_TCP)	/* a kernel that does not take it: never again */
		core->merge_tcp = 0;
	else
		core->merge_udp = 0;
	for (uint32_t i = 1; i <= count && result >= 0; i++)
		result = write_one(core, tun, (uint8_t *)merge->iov[i].iov_base - merge->header, merge->header + merge->iov[i].iov_len);
	return result;
}

/* One packet from the underlay. */
static int enter(struct core *core, int tun, const uint8_t *packet, size_t length, uint32_t host)
{
	int wrong = fault(packet, length), result;

	if (wrong >= 0) {
		core->counters[IN_SHORT + wrong]++;
		return 0;
	}
	if (!admitted(core, packet, host))
		return 0;
	if (core->merge.count) {
		if (merge_try(core, packet, length))
			return 0;
		if ((result = write_merged(core, tun)))
			return result;
	}
	return merge_start(core, packet, length) ? 0 : write_one(core, tun, packet, length);
}

/* The size of the packets in a datagram that the socket's owner before us had the kernel merge: the first packet's own, if
 * that divides it into packets of one size and a last one that is no larger. Else it is one packet, whatever it says. */
static size_t unmarked(const uint8_t *data, size_t length)
{
	size_t size = length >= 20 ? get16(data + 2) : 0;

	if (size < 20 || size >= length)
		return length;
	for (size_t at = 0; at < length; at += size) {
		size_t left = length - at;

		if (left < 20 || data[at] >> 4 != 4 || get16(data + at + 2) != (left < size ? left : size))
			return length;
	}
	return size;
}

/* The packets of one datagram. size: of each but the last, 0 when the kernel does not say. */
static int enter_all(struct core *core, int tun, const uint8_t *data, size_t length, size_t size, uint32_t host)
{
	int result = 0;

	if (!length)
		core->counters[IN_SHORT]++;
	if (!size)
		size = unmarked(data, length);
	for (size_t at = 0; at < length && !result; at += size)
		result = enter(core, tun, data + at, length - at < size ? length - at : size, host);
	return result;
}

/* One datagram, by the cheapest calls: no merged one's size is asked for, and what precedes the packet lies before it. */
static int inbound_one(struct core *core, int tun, int udp)
{
	uint8_t *frame = core->arena, *packet = frame + VNET;
	struct sockaddr_in from;
	socklen_t size = sizeof from;
	ssize_t length = recvfrom(udp, packet, RECEIVE, MSG_DONTWAIT, (struct sockaddr *)&from, &size);

	if (length < 0) {
		if (errno != EAGAIN && errno != EINTR)
			failed(core, IN_ERROR, errno, 1);	/* an error that an earlier send left on the socket */
		return 0;
	}
	core->streak = 0;
	core->datagrams = next_batch(1, 1, DATAGRAMS, ++core->inward >= STREAK || length > 4096);
	if (fault(packet, (size_t)length) >= 0) {	/* several, or none */
		int result = enter_all(core, tun, packet, (size_t)length, 0, from.sin_addr.s_addr);

		return result ? result : write_merged(core, tun);
	}
	if (!admitted(core, packet, from.sin_addr.s_addr))
		return 0;
	memset(frame, 0, VNET);
	return write_pieces(core, tun, &(struct iovec){frame, VNET + (size_t)length}, 1, 1, (uint64_t)length);
}

/* Write to the device what the socket has, at most a batch. 0, or -errno when the device is gone. */
EXPORT int wincey_inbound(struct core *core, int tun, int udp)
{
	struct mmsghdr messages[DATAGRAMS];
	struct sockaddr_in from[DATAGRAMS];
	struct iovec iov[DATAGRAMS];
	union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control[DATAGRAMS];
	int got, result = 0;
	size_t bytes = 0;

	core->merge.count = 0;
	if (core->datagrams == 1)
		return inbound_one(core, tun, udp);
	for (uint32_t i = 0; i < core->datagrams; i++) {
		iov[i] = (struct iovec){core->arena + i * (size_t)RECEIVE, RECEIVE};
		messages[i].msg_hdr = (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &iov[i],
						      .msg_iovlen = 1, .msg_control = &control[i],
						      .msg_controllen = sizeof control[i].space};
	}
	got = recvmmsg(udp, messages, core->datagrams, MSG_DONTWAIT, NULL);
	if (got < 0) {
		if (errno != EAGAIN && errno != EINTR)
			failed(core, IN_ERROR, errno, 1);
		core->datagrams = 1;
		return 0;
	}
	for (int i = 0; i < got && !result; i++) {
		struct cmsghdr *header = CMSG_FIRSTHDR(&messages[i].msg_hdr);
		int size = 0;

		if (header && header->cmsg_level == IPPROTO_UDP && header->cmsg_type == UDP_GRO)
			memcpy(&size, CMSG_DATA(header), sizeof size);
		bytes += messages[i].msg_len;
		result = enter_all(core, tun, iov[i].iov_base, messages[i].msg_len, size > 0 ? (size_t)size : 0,
				   from[i].sin_addr.s_addr);
	}
	core->streak = 0;
	core->inward += (uint32_t)got;
	core->datagrams = next_batch((uint32_t)got, core->datagrams, DATAGRAMS, core->inward >= STREAK || bytes > 4096);
	return result ? result : write_merged(core, tun);
}

/* --- what else Python calls ----------------------------------------------------------------------------------------- */

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
