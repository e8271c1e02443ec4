/* From the socket to the device, a batch at most in a call; see core.h. What is dropped is counted by reason. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <netinet/udp.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_GRO
#define UDP_GRO 104		/* include/uapi/linux/udp.h */
#endif

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
