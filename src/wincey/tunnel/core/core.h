/* The compiled core of the udp tunnel's offload engine: what its parts share.
 *
 * A plain shared library that Python calls through ctypes: it includes nothing of Python's, so that one file serves every
 * version. The same algorithm in Python is offload.py; the tests compare the two byte for byte.
 *
 *   peers.c    which host has an inner address: records to a hash table
 *   cut.c      one large packet from the device -> the packets that it stands for, each with its own checksums
 *   merge.c    consecutive packets of one flow -> one large packet for the device
 *   outbound.c system calls from the device to the socket, a batch at a time
 *   inbound.c  the same the other way
 *   core.c     the loop, and the other functions that Python calls (EXPORT)
 *
 * All addresses are kept as they stand in packets (network byte order); they are only compared.
 */
#ifndef WINCEY_CORE_H
#define WINCEY_CORE_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#define ABI 1			/* what Python checks before it calls anything else */
#define VNET 10			/* bytes of struct virtio_net_hdr, which precedes every packet on the device */
#define PACKET 65535		/* the largest IPv4 packet */
#define DATAGRAM 65507		/* the largest UDP payload, that of a train included */
#define TRAIN 64		/* segments that the kernel takes in one datagram (UDP_MAX_SEGMENTS of older kernels) */
#define HEADERS 120		/* bytes of the longest IPv4 and TCP headers together */
#define MERGED 128		/* packets in one large one */
#define FRAME (VNET + PACKET)	/* the most that a read of the device gives */
#define FRAMES 8		/* large packets of one batch; more small ones */
#define READS 64		/* of the device in one batch */
#define DATAGRAMS 16		/* of the socket in one batch, each up to a whole train */
#define RECEIVE (PACKET + 1)
#define ARENA (DATAGRAMS * RECEIVE + VNET)	/* one for both directions */
#define STREAK 4		/* packets one way and none the other: no request and its answer */

#define EXPORT __attribute__((visibility("default")))	/* all else stays inside: the build hides it */

/* include/uapi/linux/virtio_net.h, in host byte order as the device speaks it unless told otherwise */
struct vnet {
	uint8_t flags, gso_type;
	uint16_t hdr_len, gso_size, csum_start, csum_offset;
};
#define NEEDS_CSUM 1		/* flags: the checksum field holds the pseudo header's sum; the rest is to be added */
#define GSO_NONE 0
#define GSO_TCPV4 1
#define GSO_UDP_L4 5
#define GSO_ECN 0x80		/* the first segment has CWR */

/* Counters: the names are in core.c, in this order. */
enum counter {
	OUT_PACKETS, OUT_BYTES, IN_PACKETS, IN_BYTES,
	OUT_SHORT, OUT_VERSION, OUT_HEADER, OUT_LENGTH, OUT_NO_PEER, OUT_OFFLOAD,
	IN_SHORT, IN_VERSION, IN_HEADER, IN_LENGTH, IN_FOREIGN, IN_UNKNOWN, IN_DROP_SOURCE,
	OUT_SENDS, IN_WRITES,
	COUNTERS
};
enum failure { OUT_DROP, IN_DROP, IN_ERROR, FAILURES };	/* each with an errno */
#define ERRNOS 256

struct endpoint {		/* a host of the underlay */
	uint32_t address;
	uint32_t limit;		/* segments larger than this go one by one: the way there takes no larger ones in a train */
};

struct peers {
	struct peer { uint32_t network, endpoint; uint8_t length, used; } *slots;	/* endpoint: an index */
	uint32_t mask;		/* number of slots less one; a power of two */
	struct endpoint *endpoints;
	uint32_t *by_address;	/* index of an endpoint plus one, by the hash of its address */
	uint32_t count, address_mask;
	uint32_t lengths;	/* number of the prefix lengths in use */
	uint8_t length[33];	/* longest first */
};

int peers_set(struct peers *, const uint8_t *records, size_t count);
void peers_free(struct peers *);
struct endpoint *peers_route(const struct peers *, uint32_t address);
struct endpoint *peers_host(const struct peers *, uint32_t address);

/* Packets on their way out: trains of equal segments (the last may be shorter), each to be one datagram. */
#define SEGMENTS 512
#define TRAINS 64
struct train {
	struct endpoint *to;
	uint32_t bytes, size, first, iovs;	/* size: of the first segment; first: index in `iov` */
	uint8_t segments, closed;
	uint8_t parts[TRAIN];			/* pieces in `iov` of each segment */
};
struct out {
	struct train train[TRAINS];
	struct iovec iov[2 * SEGMENTS];
	uint8_t headers[SEGMENTS][HEADERS];
	uint32_t trains, iovs, segments;
};

/* A large packet for the device in the making. */
struct merge {
	struct iovec iov[1 + MERGED];		/* the virtio header, then one packet (the first one) or payload each */
	const uint8_t *first;
	uint32_t count, header, size, payload;	/* size: payload bytes of the first packet; payload: of all */
	uint16_t id_step;			/* 1: ids count up; 0: they are all alike (with DF they mean nothing) */
	uint8_t flags, closed, verified;
	uint8_t head[VNET + HEADERS];
};

struct core {
	struct peers peers;
	uint64_t counters[COUNTERS], failures[FAILURES][ERRNOS];
	struct out out;
	struct merge merge;
	uint8_t *arena;				/* what was read, until it is sent or written */
	uint32_t network, network_mask;		/* of the cluster, for the check of sources */
	uint16_t port;
	uint8_t check, trains, merge_tcp, merge_udp;
	uint32_t reads, datagrams;		/* of the next batch */
	uint64_t moment;			/* nanoseconds: when the last batch of small packets was done with */
	uint32_t streak, inward;		/* small packets out since one came in; datagrams in since one went out */
	uint32_t refused;			/* bytes of a packet that nobody has, 0 when there is none to tell of */
	uint8_t refusal[1024];
};
enum check { CHECK_OFF, CHECK_NETWORK, CHECK_STRICT };

/* cut.c: packets out. `room` sends what is there; both are called when there is no space for one more segment. */
typedef void room(struct core *, int udp);
void out_packet(struct core *, uint8_t *packet, size_t length, struct endpoint *, room *, int udp);
int out_large(struct core *, uint8_t *packet, size_t length, const struct vnet *, struct endpoint *, room *, int udp);
int finish_checksum(uint8_t *packet, size_t length, const struct vnet *);

/* merge.c: packets in. */
int merge_try(struct core *, const uint8_t *packet, size_t length);
int merge_start(struct core *, const uint8_t *packet, size_t length);
uint32_t merge_finish(struct merge *);

/* outbound.c, inbound.c: called by the loop and by Python. */
int wincey_outbound(struct core *, int tun, int udp);
int wincey_inbound(struct core *, int tun, int udp);

/* The Internet checksum's sum (RFC 1071) of bytes in memory order, not folded. */
static inline uint64_t sum(const uint8_t *data, size_t length)
{
	uint64_t total = 0;
	uint32_t word;
	uint16_t half;

	for (; length >= 4; data += 4, length -= 4) {	/* the compiler makes vectors of it */
		memcpy(&word, data, 4);
		total += word;
	}
	if (length & 2) {
		memcpy(&half, data, 2);
		total += half;
		data += 2;
	}
	if (length & 1) {
		half = 0;
		memcpy(&half, data, 1);
		total += half;
	}
	return total;
}

static inline uint16_t fold(uint64_t total)
{
	total = (total >> 32) + (uint32_t)total;
	total = (total >> 32) + (uint32_t)total;
	total = (total >> 16) + (total & 0xffff);
	total = (total >> 16) + (total & 0xffff);
	return (uint16_t)((total >> 16) + (total & 0xffff));
}

/* The sum of the pseudo header of TCP and UDP: addresses, protocol, length of what follows the IPv4 header. */
static inline uint64_t pseudo(const uint8_t *packet, uint32_t length)
{
	return sum(packet + 12, 8) + htons(packet[9]) + htons((uint16_t)length);
}

static inline uint16_t get16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }
static inline uint32_t get32(const uint8_t *at) { return (uint32_t)get16(at) << 16 | get16(at + 2); }
static inline void put16(uint8_t *at, uint32_t value) { at[0] = (uint8_t)(value >> 8); at[1] = (uint8_t)value; }
static inline void put32(uint8_t *at, uint32_t value) { put16(at, value >> 16); put16(at + 2, value); }
static inline void put_sum(uint8_t *at, uint16_t value) { memcpy(at, &value, 2); }

static inline void ip_checksum(uint8_t *packet, uint32_t header)
{
	put_sum(packet + 10, 0);
	put_sum(packet + 10, (uint16_t)~fold(sum(packet, header)));
}

static inline void failed(struct core *core, enum failure what, int error, unsigned packets)
{
	core->failures[what][error > 0 && error < ERRNOS ? error : 0] += packets;
}

/* Why this is not one whole IPv4 packet: the counter, as an offset from `..._SHORT`; -1 when it is. */
static inline int fault(const uint8_t *packet, size_t length)
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

/* How many packets to ask for next time: as many as there were, and more when there were all and it looks like many. One at a
 * time, as of a request and its answer, then costs no call that finds nothing. */
static inline uint32_t next_batch(uint32_t made, uint32_t limit, uint32_t most, int many)
{
	if (made < limit)
		return made ? made : 1;
	if (!many)
		return limit;
	return limit * 4 < most ? limit * 4 : most;
}

#endif
