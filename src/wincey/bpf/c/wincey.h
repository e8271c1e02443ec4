/* SPDX-License-Identifier: Apache-2.0
 *
 * What every program here has in common, and what a reader needs who has never seen one.
 *
 * A BPF program is a function that the kernel calls for each packet at the place where it is attached: here "tc" programs, at a
 * device's ingress (before anything else of the host sees the packet) or egress (before the device's queue). It gets the packet as
 * struct __sk_buff, may read and change it, and returns what is to become of it: a TC_ACT_ or, with bpf_redirect(), another device.
 *
 * Before it is loaded, the kernel's verifier walks every path through the code. It refuses loops without end and every access to
 * memory that it can't prove to be inside its bounds. Hence the pattern below: take skb->data and skb->data_end, compare, and only
 * then read. After any helper that may move the packet's memory both must be taken and compared anew.
 *
 * Data that outlives a packet, and that our daemon reads and writes from outside, lies in maps: tables in the kernel, found by name
 * here and by a descriptor once loaded. All functions are inlined, as scripts/bake.py links nothing.
 *
 * Numbers in packets are in network byte order, and so are addresses and ports in our maps: compared, never computed with.
 */
#ifndef WINCEY_H
#define WINCEY_H

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define INLINE static __always_inline

/* "Nothing of mine": the next program at this place, then the ordinary path. (TC_ACT_OK would keep the others from running.) */
#define NEXT TC_ACT_UNSPEC
#define DROP TC_ACT_SHOT

/* An IP packet of so many bytes or less has nothing worth merging it with: udp.c and fastpath.c have to agree on that. */
#define SMALL 128

/* A map: five numbers that scripts/bake.py reads out of the object file. MAP(name, kind, key type, value type, entries, flags) */
struct map_layout { __u32 kind, key, value, entries, flags; };
#define MAP(name, type, key_type, value_type, count, options) \
	struct map_layout name SEC("maps") = { type, sizeof(key_type), sizeof(value_type), count, options }

/* The packet's bytes that may be read directly, and their end. */
#define START(skb) ((void *)(long)(skb)->data)
#define END(skb) ((void *)(long)(skb)->data_end)

/* A key of a trie of subnets: the longest prefix that contains the address is found. */
struct subnet_key { __u32 length, address; };

/* Adds to one 64-bit counter of a per-processor array: no locks, the reader sums up. */
INLINE void add(void *counters, __u32 index, __u64 amount)
{
	__u64 *value = bpf_map_lookup_elem(counters, &index);

	if (value)
		*value += amount;
}

/* How many packets of the wire a packet here stands for: the kernel carries TCP segments of one flow as one as long as it can. */
INLINE __u32 packets(struct __sk_buff *skb)
{
	return skb->gso_segs ? skb->gso_segs : 1;
}

/* The checksum of an IPv4 header without options (RFC 1071), of ten 16-bit words; 0 over a header that has a right one in it. */
INLINE __u16 header_checksum(const struct iphdr *ip)
{
	const __u16 *word = (const void *)ip;
	__u32 sum = 0;
	int i;

#pragma unroll
	for (i = 0; i < 10; i++)
		sum += word[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum += sum >> 16;
	return ~sum;
}

#endif
