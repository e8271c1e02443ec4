// SPDX-License-Identifier: Apache-2.0
//
// The fast path of containers: flows that the host's own stack has let pass go from a container's cable to the wire, and
// from the wire into the container, without the bridge, routing, netfilter and the tunnel device in between.
//
// These programs decide nothing themselves. They copy, for at most a second, what the ordinary path has just decided:
//
//   1. An nft rule at the end of the FORWARD hook sets a bit in the mark of packets that are accepted, belong to an established
//      connection, and have no NAT (see fastpath.py for the rule).
//   2. Where such a packet leaves the host's stack, a program at the egress of that device sees all that was decided: by which
//      device it leaves, with which headers in front of the container's packet, how large it is. It notes this under the
//      flow's addresses and ports (fast_learn_out: underlay or tunnel device; fast_learn_in: host's end of the container's cable)
//      and takes the bit off.
//   3. The next packets of the flow, for one second, are sent the same way by a program at the place where they come in
//      (fast_out: at the container's cable; fast_in: at the underlay or tunnel device).
//   4. After that second one packet takes the ordinary path again. So each flow shows netfilter a packet a second: a new DROP rule
//      ends a running flow within a second, connections stay known to conntrack, a change of route, neighbour, MAC address
//      or MTU is followed within a second, and nothing has to be told to these programs or taken back from them. They go on working
//      when nobody is there to look after them, and a container that is gone is forgotten by itself.
//
// A packet with anything unusual about it (fragment, IP options, VLAN tag, first and last packets of a TCP connection, larger
// than what the ordinary path has let pass within this second, TTL at its end) takes the ordinary path, which knows what to do.
//
// How such a program is made and what its words mean: see wincey.h.

#include "wincey.h"

#define FRESH 1000000000ULL /* nanoseconds for which something learned is used, by a clock that ticks every 1 to 10 ms */

/* flannel's udp has no receive offload of its own: TCP segments would reach the container one by one. Those that have something to be
 * merged with are left to the udp backend's merging pair (udp.c), and taken in behind it (fast_merged). SMALL ones pass it by, but not
 * while a larger one of their flow may be in there still. */
#define MERGED_UNIT 20   /* binary digits of a nanosecond: about a millisecond */
#define MERGED_FOR 40    /* of these; twice udp.c's BULK, so that it lets them out first */

/* The headers in front of the container's IP packet as it leaves the host: these three forms. */
#define PLAIN 14 /* Ethernet: a route, or into the tunnel device */
#define UDP 42   /* Ethernet, IP, UDP: flannel's udp backend */
#define VXLAN 64 /* Ethernet, IP, UDP, VXLAN, Ethernet */

/* Places within them. */
#define AT_TOS 15
#define AT_LENGTH 16
#define AT_ID 18
#define AT_CHECK 24
#define AT_SOURCE 26
#define AT_DESTINATION 30
#define AT_UDP_LENGTH 38
#define AT_UDP_CHECK 40
#define AT_INNER 50     /* the inner frame: the MAC address it goes to, */
#define AT_INNER_MAC 56 /* and our own tunnel device's, which it comes from */

struct conf {
	__u32 mark;     /* the bit; host byte order, as all that is not said to be otherwise */
	__u32 local;    /* our address in outer headers; network byte order, and so the next four */
	__u32 subnet;   /* of this host's containers */
	__u32 mask;
	__u32 vni;      /* as it stands in the VXLAN header, with the reserved byte */
	__u16 port;     /* UDP, of the tunnel */
	__u16 form;     /* of packets at the underlay device that come in to `local` and `port`: VXLAN, UDP, or PLAIN for none */
};

/* A flow by its container's end and the other one, whichever way the packet goes; network byte order. */
struct key {
	__u32 here, there;
	__u16 here_port, there_port;
	__u32 protocol;
};

struct flow {
	__u64 head[8];    /* the headers that it leaves with, without length, id and checksum */
	__u64 out_seen;   /* when the ordinary path let a packet of it out, in ns since boot; 0 for never */
	__u64 in_seen;    /* the same, into the container */
	__u32 out_device; /* index of the device that it leaves by */
	__u32 in_device;  /* index of the host's end of the container's cable */
	__u16 out_most;   /* the largest IP packet (of a super packet: segment) that the ordinary path let out */
	__u16 in_most;
	__u16 form;       /* how much of `head` is used */
	__u8 macs[12];    /* the container's MAC address, then that of the host in the container's network */
	__u8 unused[2];
	__u32 merged;     /* when a segment of it was last left to the merging pair, in MERGED_UNIT since boot */
};

MAP(conf, BPF_MAP_TYPE_ARRAY, __u32, struct conf, 1, 0);

/* The flow that was unused for longest makes room for a new one. */
MAP(flows, BPF_MAP_TYPE_LRU_HASH, struct key, struct flow, 32768, 0);

/* Packets by what became of them; the order is fastpath.py's COUNTERS. */
enum { OUT, IN, LEARNED_OUT, LEARNED_IN, TOO_LARGE, WRONG_SOURCE, COUNTERS };

MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, COUNTERS, 0);

/* What a container's packet says of itself. size: of the IP packet, or of each that a super packet will be cut into. */
struct packet {
	struct key key;
	__u32 size;
	int ends; /* a first or last packet of a TCP connection */
};

INLINE struct conf *configuration(void)
{
	__u32 first = 0;

	return bpf_map_lookup_elem(&conf, &first);
}

/* Read the IP packet `at` bytes from the start. out: its source is the container. 0 if it is none for us. */
INLINE int read(struct __sk_buff *skb, __u32 at, int out, struct packet *packet)
{
	struct iphdr *ip;
	__u8 *transport;
	__u16 *ports;
	__u32 header = 8, length;

	if (START(skb) + at + 28 > END(skb))
		return 0;
	ip = START(skb) + at;
	if (*(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff)) /* version 4 without options; fragments */
		return 0;
	transport = (void *)(ip + 1);
	ports = (void *)transport;
	packet->ends = 0;
	if (ip->protocol == IPPROTO_TCP) {
		if (START(skb) + at + 40 > END(skb))
			return 0;
		packet->ends = transport[13] & 0x07; /* FIN, SYN, RST */
		header = (transport[12] >> 4) * 4;
	} else if (ip->protocol != IPPROTO_UDP) {
		return 0;
	}
	packet->key.here = out ? ip->saddr : ip->daddr;
	packet->key.there = out ? ip->daddr : ip->saddr;
	packet->key.here_port = out ? ports[0] : ports[1];
	packet->key.there_port = out ? ports[1] : ports[0];
	packet->key.protocol = ip->protocol;
	length = at + bpf_ntohs(ip->tot_len);
	if (skb->len != length && (out || skb->gso_size || skb->len < length))
		return 0; /* cut off, or more than one packet; what comes from the wire may be padded to 60 bytes */
	packet->size = skb->gso_size ? sizeof(*ip) + header + skb->gso_size : length - at;
	return 1;
}

/* Have enough of the packet in one piece that `read` works: the rest of it may lie elsewhere. */
INLINE void gather(struct __sk_buff *skb, __u32 at)
{
	__u32 wanted = at + 40 < skb->len ? at + 40 : skb->len;

	if (START(skb) + wanted > END(skb))
		bpf_skb_pull_data(skb, wanted);
}

/* One second begins with the first packet that the ordinary path lets pass, and nothing makes it longer. */
INLINE void note(__u64 *seen, __u16 *most, __u32 size)
{
	__u64 now = bpf_ktime_get_coarse_ns();

	if (now - *seen >= FRESH) {
		*most = size;
		*seen = now;
	} else if (size > *most) {
		*most = size;
	}
}

INLINE int fresh(__u64 seen)
{
	return bpf_ktime_get_coarse_ns() - seen < FRESH;
}

INLINE int inside(struct conf *cfg, __u32 address)
{
	return (address & cfg->mask) == cfg->subnet;
}

INLINE int decrement_ttl(struct iphdr *ip)
{
	__u32 sum = ip->check; /* RFC 1624; the TTL is the first byte of its 16 bits */

	sum += bpf_htons(0x0100);
	ip->check = sum + (sum >= 0xffff);
	return --ip->ttl;
}

/* Learn the way out from a packet that leaves by this device; `form` is what stands in front of the container's packet. */
INLINE int learn_out(struct __sk_buff *skb, struct conf *cfg, const __u32 form)
{
	struct packet packet = {};
	struct flow new = {}, *flow;
	__u8 *head = (void *)new.head;
	struct iphdr *ip;

	gather(skb, form);
	ip = START(skb) + form;
	if ((void *)(ip + 1) > END(skb) || !inside(cfg, ip->saddr)) /* another network of this host may use the same bit */
		return NEXT;
	skb->mark &= ~cfg->mark;
	if (!read(skb, form, 1, &packet) || packet.ends || inside(cfg, packet.key.there))
		return NEXT;
	if (bpf_skb_load_bytes(skb, 0, head, form))
		return NEXT;
	if (form != PLAIN) {
		head[AT_TOS] &= 0xfc; /* the rest is the inner packet's congestion mark */
		*(__u16 *)(head + AT_LENGTH) = 0;
		*(__u16 *)(head + AT_ID) = 0;
		*(__u16 *)(head + AT_CHECK) = 0;
		*(__u16 *)(head + AT_UDP_LENGTH) = 0;
		*(__u16 *)(head + AT_UDP_CHECK) = 0; /* RFC 768: none; the inner packet has its own */
	}
	add(&counters, LEARNED_OUT, packets(skb));
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (flow) {
		int same = flow->form == form && flow->out_device == skb->ifindex;

#pragma unroll
		for (int i = 0; i < 8; i++)
			same &= flow->head[i] == new.head[i];
		if (same) {
			note(&flow->out_seen, &flow->out_most, packet.size);
			return NEXT;
		}
		new.in_seen = flow->in_seen;
		new.in_device = flow->in_device;
		new.in_most = flow->in_most;
		__builtin_memcpy(new.macs, flow->macs, sizeof(new.macs));
	}
	new.form = form;
	new.out_device = skb->ifindex;
	new.out_seen = bpf_ktime_get_coarse_ns();
	new.out_most = packet.size;
	bpf_map_update_elem(&flows, &packet.key, &new, BPF_ANY);
	return NEXT;
}

/* Egress of the underlay device, or of the tunnel device. */
SEC("tc") int fast_learn_out(struct __sk_buff *skb)
{
	struct conf *cfg;
	struct udphdr *udp;
	struct iphdr *ip;

	if (!skb->mark) /* as nearly all packets */
		return NEXT;
	cfg = configuration();
	if (!cfg || !(skb->mark & cfg->mark) || skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return NEXT;
	gather(skb, PLAIN);
	if (START(skb) + 42 > END(skb))
		return NEXT;
	ip = START(skb) + PLAIN;
	udp = (void *)(ip + 1);
	if (ip->saddr != cfg->local)
		return learn_out(skb, cfg, PLAIN);
	if (*(__u8 *)ip != 0x45 || ip->protocol != IPPROTO_UDP || udp->dest != cfg->port || ip->frag_off & bpf_htons(0x3fff))
		return NEXT;
	if (cfg->form == VXLAN)
		return learn_out(skb, cfg, VXLAN);
	if (cfg->form == UDP)
		return learn_out(skb, cfg, UDP);
	return NEXT;
}

/* Egress of the host's end of a container's cable: the way in. */
SEC("tc") int fast_learn_in(struct __sk_buff *skb)
{
	struct conf *cfg;
	struct packet packet = {};
	struct flow new = {}, *flow;
	struct iphdr *ip;
	__u8 macs[12];

	if (!skb->mark)
		return NEXT;
	cfg = configuration();
	if (!cfg || !(skb->mark & cfg->mark) || skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return NEXT;
	gather(skb, PLAIN);
	ip = START(skb) + PLAIN;
	if ((void *)(ip + 1) > END(skb) || !inside(cfg, ip->daddr))
		return NEXT;
	skb->mark &= ~cfg->mark;
	if (!read(skb, PLAIN, 0, &packet) || packet.ends || inside(cfg, packet.key.there))
		return NEXT;
	if (bpf_skb_load_bytes(skb, 0, macs, sizeof(macs)))
		return NEXT;
	add(&counters, LEARNED_IN, packets(skb));
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (flow) {
		int same = flow->in_device == skb->ifindex;

#pragma unroll
		for (int i = 0; i < 12; i++)
			same &= flow->macs[i] == macs[i];
		if (same) {
			note(&flow->in_seen, &flow->in_most, packet.size);
			return NEXT;
		}
		__builtin_memcpy(&new, flow, sizeof(new));
	}
	__builtin_memcpy(new.macs, macs, sizeof(macs));
	new.in_device = skb->ifindex;
	new.in_seen = bpf_ktime_get_coarse_ns();
	new.in_most = packet.size;
	bpf_map_update_elem(&flows, &packet.key, &new, BPF_ANY);
	return NEXT;
}

/* Make room for the outer headers, and write them. `form` is a constant, as the kernel wants to know how far we write. */
INLINE int wrap(struct __sk_buff *skb, struct flow *flow, const __u32 form)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
	/* The kernel counts the inner Ethernet header alone as layer 2 there; it would cut super packets wrongly otherwise. */
	const __u64 ethernet = BPF_F_ADJ_ROOM_ENCAP_L2(14) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;
	struct iphdr *outer, *inner;
	__u64 *to;
	__u32 length = skb->len + form - 2 * PLAIN; /* of the outer IP packet */
	__u32 count = packets(skb); /* which adjusting room forgets */

	if (length > 0xffff)
		return NEXT;
	if (bpf_skb_adjust_room(skb, form - PLAIN, BPF_ADJ_ROOM_MAC, form == VXLAN ? flags | ethernet : flags))
		return NEXT; /* nothing was changed: the ordinary path takes it */
	if (START(skb) + form + sizeof(*inner) > END(skb))
		return DROP;
	to = START(skb);
#pragma unroll
	for (int i = 0; i < form / 8; i++)
		to[i] = flow->head[i];
	if (form % 8)
		*(__u16 *)&to[form / 8] = flow->head[form / 8]; /* 42 = 5 times 8, and 2 */
	outer = START(skb) + PLAIN;
	inner = START(skb) + form;
	decrement_ttl(inner);
	outer->tot_len = bpf_htons(length);
	outer->id = bpf_get_prandom_u32();
	outer->tos |= (inner->tos & 3) == 3 ? 2 : inner->tos & 3; /* as the kernel's tunnels (RFC 6040): that it is capable */
	outer->check = header_checksum(outer);
	((struct udphdr *)(outer + 1))->len = bpf_htons(length - sizeof(*outer));
	add(&counters, OUT, count);
	return bpf_redirect(flow->out_device, 0);
}

/* Ingress of the host's end of a container's cable. */
SEC("tc") int fast_out(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct flow *flow;
	struct iphdr *ip;
	__u8 *frame;
	int same = 1;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return NEXT;
	gather(skb, PLAIN);
	if (!read(skb, PLAIN, 1, &packet))
		return NEXT;
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (!flow)
		return NEXT;
	if (packet.ends) { /* what follows has to be let pass anew */
		bpf_map_delete_elem(&flows, &packet.key);
		return NEXT;
	}
	if (!fresh(flow->out_seen) || !flow->in_device) /* not yet seen in both directions */
		return NEXT;
	if (packet.size > flow->out_most) {
		add(&counters, TOO_LARGE, packets(skb));
		return NEXT;
	}
	if (START(skb) + PLAIN + sizeof(*ip) > END(skb))
		return NEXT;
	frame = START(skb);
#pragma unroll
	for (int i = 0; i < 6; i++)
		same &= frame[i] == flow->macs[6 + i];
	if (!same || skb->ifindex != flow->in_device) { /* not to the host as a router, or another container's address */
		add(&counters, WRONG_SOURCE, packets(skb));
		return NEXT;
	}
	ip = (void *)(frame + PLAIN);
	if (ip->ttl <= 1)
		return NEXT;
	if (flow->form == VXLAN)
		return wrap(skb, flow, VXLAN);
	if (flow->form == UDP)
		return wrap(skb, flow, UDP);
	if (flow->form != PLAIN)
		return NEXT;
	__builtin_memcpy(frame, flow->head, 12);
	decrement_ttl(ip);
	add(&counters, OUT, packets(skb));
	return bpf_redirect(flow->out_device, 0);
}

/* Whether a packet, not yet unwrapped, goes through the merging pair. */
INLINE int merges(struct __sk_buff *skb, struct packet *packet, struct flow *flow)
{
	__u32 now = bpf_ktime_get_coarse_ns() >> MERGED_UNIT;

	if (packet->key.protocol != IPPROTO_TCP || skb->gso_size)
		return 0;
	if (packet->size > SMALL)
		flow->merged = now;
	return now + 1 - flow->merged <= MERGED_FOR; /* another processor may be one ahead */
}

/* Take the outer headers off, and hand the packet to the container. merged: it has come through the merging pair, whose entrance has
 * looked at where it came from. */
INLINE int deliver(struct __sk_buff *skb, const __u32 form, const int merged)
{
	struct packet packet = {};
	struct flow *flow;
	struct iphdr *ip;
	__u8 *frame, *head;
	__u32 count = packets(skb);
	int same = 1;

	gather(skb, form);
	if (!read(skb, form, 0, &packet))
		return NEXT;
	flow = bpf_map_lookup_elem(&flows, &packet.key);
	if (!flow)
		return NEXT;
	if (packet.ends) {
		bpf_map_delete_elem(&flows, &packet.key);
		return NEXT;
	}
	if (!fresh(flow->in_seen) || !flow->form) /* not yet seen in both directions */
		return NEXT;
	if (packet.size > flow->in_most) {
		add(&counters, TOO_LARGE, packets(skb));
		return NEXT;
	}
	if (START(skb) + form + sizeof(*ip) > END(skb))
		return NEXT;
	frame = START(skb);
	ip = (void *)(frame + form);
	if (form == UDP && merges(skb, &packet, flow))
		return NEXT;
	/* It has to come from where the flow's answers go to: the ordinary path has learned that, and so have we. */
	head = (void *)flow->head;
	if (merged) {
		same = flow->form == UDP;
	} else if (form == VXLAN && flow->form == PLAIN) { /* those the tunnel device wraps: its frames' two addresses are all that we know */
#pragma unroll
		for (int i = 0; i < 6; i++) {
			same &= frame[AT_INNER + i] == head[6 + i];
			same &= frame[AT_INNER_MAC + i] == head[i];
		}
	} else {
		same = flow->form == form;
		if (form != PLAIN)
			same &= *(__u32 *)(frame + AT_SOURCE) == *(__u32 *)(head + AT_DESTINATION);
		if (form == VXLAN) {
#pragma unroll
			for (int i = 0; i < 6; i++)
				same &= frame[AT_INNER + i] == head[AT_INNER_MAC + i];
		}
	}
	if (!same) {
		add(&counters, WRONG_SOURCE, packets(skb));
		return NEXT;
	}
	if (ip->ttl <= 1)
		return NEXT;
	if (form != PLAIN) {
		if (bpf_skb_adjust_room(skb, -(int)(form - PLAIN), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
			return NEXT;
		if (START(skb) + PLAIN + sizeof(*ip) > END(skb))
			return DROP;
		frame = START(skb);
		ip = (void *)(frame + PLAIN);
	}
	__builtin_memcpy(frame, flow->macs, 12);
	decrement_ttl(ip);
	add(&counters, IN, count);
	return bpf_redirect_peer(flow->in_device, 0);
}

/* Ingress of the underlay device, or of the tunnel device. */
SEC("tc") int fast_in(struct __sk_buff *skb)
{
	struct conf *cfg;
	struct udphdr *udp;
	struct iphdr *ip;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || skb->pkt_type) /* another host's, or to all */
		return NEXT;
	cfg = configuration();
	gather(skb, PLAIN);
	if (!cfg || START(skb) + 42 > END(skb))
		return NEXT;
	ip = START(skb) + PLAIN;
	udp = (void *)(ip + 1);
	if (inside(cfg, ip->daddr))
		return deliver(skb, PLAIN, 0);
	if (*(__u8 *)ip != 0x45 || ip->protocol != IPPROTO_UDP || ip->daddr != cfg->local || udp->dest != cfg->port)
		return NEXT;
	if (ip->frag_off & bpf_htons(0x3fff) || (ip->tos & 3) == 3) /* fragments; met congestion, which the inner packet is to be told */
		return NEXT;
	if (cfg->form == UDP)
		return deliver(skb, UDP, 0);
	if (cfg->form != VXLAN)
		return NEXT;
	gather(skb, VXLAN);
	if (START(skb) + VXLAN > END(skb))
		return NEXT;
	ip = START(skb) + PLAIN;
	udp = (void *)(ip + 1);
	__u32 *vxlan = (void *)(udp + 1);
	__u16 *protocol = START(skb) + VXLAN - 2;
	if (vxlan[0] != bpf_htonl(0x08000000) || vxlan[1] != cfg->vni || *protocol != bpf_htons(ETH_P_IP))
		return NEXT;
	return deliver(skb, VXLAN, 0);
}

/* Ingress of the udp backend's merging pair, where what it has merged comes out. */
SEC("tc") int fast_merged(struct __sk_buff *skb)
{
	struct conf *cfg = configuration();
	struct iphdr *ip;

	gather(skb, PLAIN);
	ip = START(skb) + PLAIN;
	if (!cfg || skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > END(skb) || !inside(cfg, ip->daddr))
		return NEXT;
	return deliver(skb, PLAIN, 1);
}

/* Not attached anywhere: run once on a packet that goes nowhere, to see whether this kernel wraps as we need it. */
SEC("tc") int fast_probe(struct __sk_buff *skb)
{
	return bpf_skb_adjust_room(skb, VXLAN - PLAIN, BPF_ADJ_ROOM_MAC,
				   BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
					   BPF_F_ADJ_ROOM_ENCAP_L2(14) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH);
}

char _license[] SEC("license") = "Apache-2.0";
