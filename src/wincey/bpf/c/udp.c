/* SPDX-License-Identifier: Apache-2.0
 *
 * The udp backend in the kernel. On the wire: IPv4, UDP, and as its payload the bare inner IPv4 packet.
 *
 *   out   host's routing -> egress of flannel0 [udp_tun_out] -> 28 bytes in front -> next hop's device
 *         for a peer whose other end is a process: -> a veth pair without offloads [udp_cut_in] -> the same
 *   in    underlay's ingress [udp_wire_in] -> 28 bytes off -> a veth pair that merges [udp_merge_in] -> "received on flannel0"
 *         what has nothing to merge with (not TCP; small segments of a flow that has sent no large one just now):
 *         -> "received on flannel0"
 *
 * Before and after, everything of the host's own stack runs: routing, TTL, ICMP errors, packet filter, NAT, conntrack. What a program
 * does not take goes the ordinary way, through the TUN device or the UDP socket to the keeper, the process that is there all the time:
 * inner packets without a route, outer fragments, IP options, senders that we do not know.
 */
#include "wincey.h"

#define HEADERS (sizeof(struct iphdr) + sizeof(struct udphdr))

/* config.check: which inner sources are taken from a peer */
#define CHECK_OFF 0	/* any */
#define CHECK_NETWORK 1	/* inside the network those that the peer has leased, outside it any */
#define CHECK_STRICT 2	/* those that the peer has leased */

/* Acknowledgements and questions of a few bytes (SMALL) come one by one, and the merging pair costs them a tenth of their way. They may
 * pass it by if nothing of their flow is in there still, which they would overtake, and nothing to merge is on its way. */
#define BULK 20000000ULL	/* nanoseconds since the last segment above that: more are to be expected until then. Read from a clock that
				 * ticks every 1 to 10 ms and costs nothing, so it is at least one of those ticks */
#define LINGERS 100000ULL	/* nanoseconds that a segment may be in the pair: longer than one round of the underlay's NAPI */
#define FLOWS 4096		/* places for flows; those that share one are taken for one */

#define PROCESS 1	/* route.flags: the other end is a process, which wants segments and checksums finished */

enum { OUT_PACKETS, OUT_BYTES, IN_PACKETS, IN_BYTES, OUT_CUT, OUT_PASSED, IN_PASSED, DROP_SOURCE, DROP_ERROR, COUNTERS };

struct config {
	__u32 local;		/* our address in the underlay */
	__u32 network, mask;	/* the containers' network */
	__u32 underlay, tun, cut, merge;	/* indices of devices; of the pairs: the end to send into */
	__u16 port;
	__u16 mtu;		/* of the TUN; in host byte order */
	__u8 merge_mac[6];	/* of the end that receives */
	__u8 check;
	__u8 unused;
};
struct route { __u32 host; __u32 flags; };
struct merged { __u64 small, large; };	/* when segments of a flow last went into the merging pair, in ns since boot */

MAP(config, BPF_MAP_TYPE_ARRAY, __u32, struct config, 1, 0);
MAP(routes, BPF_MAP_TYPE_LPM_TRIE, struct subnet_key, struct route, 1 << 17, BPF_F_NO_PREALLOC);
MAP(hosts, BPF_MAP_TYPE_HASH, __u32, __u32, 1 << 17, BPF_F_NO_PREALLOC);
MAP(merged, BPF_MAP_TYPE_ARRAY, __u32, struct merged, FLOWS, 0);
MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, 16, 0);

struct outer { struct iphdr ip; struct udphdr udp; };	/* 28 bytes, without gaps */
struct inbound { struct iphdr ip; struct udphdr udp; struct iphdr in; };

INLINE struct config *get_config(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

INLINE struct route *find_route(__u32 address)
{
	struct subnet_key key = { 32, address };

	return bpf_map_lookup_elem(&routes, &key);
}

/* Whether a packet, not yet unwrapped, has to go through the merging pair. */
INLINE int merges(struct __sk_buff *skb, struct inbound *frame)
{
	__u32 *ports = (void *)(frame + 1), place;
	__u64 tick = bpf_ktime_get_coarse_ns(), now;
	struct merged *last;

	if (frame->in.protocol != IPPROTO_TCP)
		return 0;
	if (frame->in.ihl != 5 || (void *)(ports + 1) > END(skb))
		return 1;
	place = (frame->in.saddr ^ frame->in.daddr ^ *ports) * 0x9e3779b1 >> 20;	/* 2^32 / golden ratio: spreads them */
	last = bpf_map_lookup_elem(&merged, &place);
	if (!last)
		return 1;
	if (skb->gso_size || bpf_ntohs(frame->in.tot_len) > SMALL) {
		last->large = tick;
		return 1;
	}
	now = bpf_ktime_get_ns();
	if (tick + BULK - last->large > 2 * BULK && now - last->small > LINGERS)	/* another processor may be a tick ahead */
		return 0;
	last->small = now;
	return 1;
}

/* An Ethernet header of zeros in front of a bare IP packet: redirecting drops packets without one. */
INLINE int push_ethernet(struct __sk_buff *skb)
{
	struct ethhdr *eth;

	if (bpf_skb_change_head(skb, sizeof(*eth), 0))
		return -1;
	eth = START(skb);
	if ((void *)(eth + 1) > END(skb))
		return -1;
	__builtin_memset(eth, 0, 12);
	eth->h_proto = bpf_htons(ETH_P_IP);
	return 0;
}

/* Puts the outer headers in front of the inner packet, which begins `at` bytes into the frame, and sends it on its way.
 * A packet that stands for many segments stays whole: the flags tell how the headers of each have to be made later. */
INLINE int wrap(struct __sk_buff *skb, struct config *cfg, struct route *route, int at, int otherwise)
{
	struct iphdr *in = START(skb) + at;
	struct outer *outer;
	__u32 length, host = route->host, count = packets(skb);	/* which adjusting room forgets */

	if ((void *)(in + 1) > END(skb))
		return otherwise;
	length = bpf_ntohs(in->tot_len) + HEADERS;
	if (bpf_skb_adjust_room(skb, HEADERS, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP))
		return otherwise;
	outer = START(skb) + at;
	if ((void *)(outer + 1) > END(skb))
		return DROP;
	__builtin_memset(outer, 0, sizeof(*outer));	/* DF clear, no UDP checksum, which IPv4 permits */
	outer->ip.version = 4;
	outer->ip.ihl = 5;
	outer->ip.tot_len = bpf_htons(length);
	outer->ip.id = bpf_get_prandom_u32();	/* the underlay may fragment, and then it matters */
	outer->ip.ttl = 64;
	outer->ip.protocol = IPPROTO_UDP;
	outer->ip.saddr = cfg->local;
	outer->ip.daddr = host;
	outer->ip.check = header_checksum(&outer->ip);
	outer->udp.source = cfg->port;
	outer->udp.dest = cfg->port;
	outer->udp.len = bpf_htons(length - sizeof(struct iphdr));
	if (!at && push_ethernet(skb))
		return DROP;
	add(&counters, OUT_PACKETS, count);
	add(&counters, OUT_BYTES, skb->len - sizeof(struct ethhdr) - HEADERS);
	return bpf_redirect_neigh(cfg->underlay, 0, 0, 0);	/* gateway and MAC from the kernel's own tables */
}

/* Egress of flannel0: a bare IP packet which the host has routed to another host's containers. */
SEC("tc") int udp_tun_out(struct __sk_buff *skb)
{
	struct config *cfg = get_config();
	struct iphdr *ip = START(skb);
	struct route *route;

	if (!cfg || skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > END(skb))
		return NEXT;
	route = find_route(ip->daddr);
	/* A packet that is too large for the device as it is (somebody has just made that smaller), or with our headers
	 * too large for IP's own limit: the keeper's socket fragments. */
	if (!route || (!skb->gso_size && skb->len > cfg->mtu) || bpf_ntohs(ip->tot_len) + HEADERS > 0xffff || !ip->tot_len) {
		add(&counters, OUT_PASSED, packets(skb));
		return NEXT;
	}
	if (route->flags & PROCESS) {
		if (push_ethernet(skb))
			return DROP;
		skb->mark = 0;	/* the fast path (fastpath.c) must not learn from it: its packets are not finished */
		add(&counters, OUT_CUT, packets(skb));
		return bpf_redirect(cfg->cut, 0);
	}
	return wrap(skb, cfg, route, 0, NEXT);
}

/* Ingress of the cutting pair's other end: the segments, with their checksums. */
SEC("tc") int udp_cut_in(struct __sk_buff *skb)
{
	struct config *cfg = get_config();
	struct iphdr *ip = START(skb) + sizeof(struct ethhdr);
	struct route *route;

	if (!cfg || skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > END(skb))
		return DROP;	/* the host's own chatter on a new device: it has no business here */
	route = find_route(ip->daddr);
	if (!route) {	/* it has just gone */
		add(&counters, DROP_ERROR, 1);
		return DROP;
	}
	return wrap(skb, cfg, route, sizeof(struct ethhdr), DROP);
}

/* Ingress of the underlay's device: every packet that the host receives there. */
SEC("tc") int udp_wire_in(struct __sk_buff *skb)
{
	struct config *cfg = get_config();
	struct inbound *frame = START(skb) + sizeof(struct ethhdr);
	struct route *route;
	struct ethhdr *eth;
	__u32 sender, source, count = packets(skb);
	__u16 length;
	int merge;

	/* A tag that the hardware took off means another network, which has a device of its own above this one. */
	if (!cfg || skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return NEXT;
	if ((void *)(frame + 1) > END(skb)) {
		if (bpf_skb_pull_data(skb, sizeof(struct ethhdr) + sizeof(*frame)))	/* too short for us */
			return NEXT;
		frame = START(skb) + sizeof(struct ethhdr);
		if ((void *)(frame + 1) > END(skb))
			return NEXT;
	}
	if (frame->ip.ihl != 5 || frame->ip.version != 4 || frame->ip.protocol != IPPROTO_UDP || frame->udp.dest != cfg->port ||
	    frame->ip.daddr != cfg->local)
		return NEXT;
	/* Ours, then. What follows is what is not quite as we make it, and so for the host's stack and the keeper: fragments,
	 * damaged headers, and datagrams that are not one inner packet (several in one are what segmentation offload makes of
	 * a process's batch). */
	length = bpf_ntohs(frame->udp.len);
	if ((frame->ip.frag_off & bpf_htons(0x3fff)) || header_checksum(&frame->ip) || frame->in.version != 4 || frame->in.ihl < 5 ||
	    bpf_ntohs(frame->ip.tot_len) != length + sizeof(struct iphdr) ||
	    bpf_ntohs(frame->in.tot_len) + sizeof(struct udphdr) != length ||
	    skb->len < sizeof(struct ethhdr) + sizeof(struct iphdr) + length) {
		add(&counters, IN_PASSED, 1);
		return NEXT;
	}
	if (cfg->check != CHECK_OFF) {
		sender = frame->ip.saddr;
		source = frame->in.saddr;
		route = find_route(source);
		if (!route || route->host != sender) {
			if (!bpf_map_lookup_elem(&hosts, &sender)) {	/* maybe a peer of whom we are about to hear */
				add(&counters, IN_PASSED, 1);
				return NEXT;
			}
			if (route || cfg->check == CHECK_STRICT || (source & cfg->mask) == cfg->network) {
				add(&counters, DROP_SOURCE, packets(skb));
				return DROP;
			}
		}
	}
	merge = merges(skb, frame);
	if (bpf_skb_adjust_room(skb, -(int)HEADERS, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO)) {
		add(&counters, IN_PASSED, 1);
		return NEXT;
	}
	eth = START(skb);
	if ((void *)(eth + 1) > END(skb))
		return DROP;
	__builtin_memcpy(eth->h_dest, cfg->merge_mac, 6);
	add(&counters, IN_PACKETS, count);
	add(&counters, IN_BYTES, skb->len - sizeof(*eth));
	return merge ? bpf_redirect(cfg->merge, 0) : bpf_redirect(cfg->tun, BPF_F_INGRESS);
}

/* Ingress of the merging pair's other end, after generic receive offload has put TCP segments of one flow together. */
SEC("tc") int udp_merge_in(struct __sk_buff *skb)
{
	struct config *cfg = get_config();

	if (!cfg || skb->protocol != bpf_htons(ETH_P_IP))
		return DROP;
	return bpf_redirect(cfg->tun, BPF_F_INGRESS);
}

char _license[] SEC("license") = "Apache-2.0";
