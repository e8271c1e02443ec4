/* From the underlay to the device: consecutive packets of one flow become one large packet, which the kernel handles once.
 *
 * What is merged must come out the same when the kernel, here or in a container, cuts it again: all headers alike but for
 * lengths, ids, sequence numbers, checksums, and PSH and FIN on the last. All checksums are verified before, as the kernel
 * takes a large packet for verified.
 */
#include "core.h"

#define FIN 0x01
#define PSH 0x08
#define ACK 0x10
#define ECE 0x40

/* The bytes of both headers if a packet may be part of a large one, else 0. `packet` is a whole IPv4 packet. */
static uint32_t mergeable(const struct core *core, const uint8_t *packet, size_t length)
{
	uint32_t header;

	if (packet[0] != 0x45 || get16(packet + 6) & 0xbfff)	/* IP options; a fragment; the reserved bit */
		return 0;
	if (packet[9] == IPPROTO_TCP && core->merge_tcp && length > 40) {
		header = 20 + (packet[32] >> 4) * 4u;
		return header >= 40 && header < length && (packet[33] & ~(FIN | PSH | ECE)) == ACK ? header : 0;
	}
	if (packet[9] == IPPROTO_UDP && core->merge_udp && length > 28)
		return get16(packet + 24) == length - 20 && get16(packet + 26) ? 28 : 0;
	return 0;
}

static int verified(const uint8_t *packet, size_t length)
{
	return fold(sum(packet, 20)) == 0xffff
	       && fold(pseudo(packet, (uint32_t)length - 20) + sum(packet + 20, length - 20)) == 0xffff;
}

/* Whether two packets of the same header length are of one flow and may be in one large packet. */
static int alike(const uint8_t *a, const uint8_t *b, uint32_t header)
{
	if (memcmp(a, b, 2) || memcmp(a + 6, b + 6, 4) || memcmp(a + 12, b + 12, 12))
		return 0;	/* version, TOS; fragment flags, TTL, protocol; addresses and ports */
	if (a[9] == IPPROTO_UDP)
		return 1;
	return !memcmp(a + 28, b + 28, 5) && !((a[33] ^ b[33]) & ~(FIN | PSH)) && !memcmp(a + 34, b + 34, 2)
	       && !memcmp(a + 38, b + 38, header - 38);	/* acknowledgement, offset; flags; window; urgent pointer, options */
}

/* Begin a large packet with this one; 0 when it can't be part of one. There must be none in the making. */
int merge_start(struct core *core, const uint8_t *packet, size_t length)
{
	struct merge *merge = &core->merge;
	uint32_t header = mergeable(core, packet, length);

	if (!header)
		return 0;
	merge->first = packet;
	merge->count = 1;
	merge->header = header;
	merge->size = merge->payload = (uint32_t)length - header;
	merge->flags = packet[9] == IPPROTO_TCP ? packet[33] : 0;
	merge->closed = (merge->flags & (FIN | PSH)) != 0;
	merge->verified = 0;
	merge->iov[1] = (struct iovec){(void *)packet, length};
	return 1;
}

/* Add a packet to the large one in the making; 0 when it is not the next one of the same flow. */
int merge_try(struct core *core, const uint8_t *packet, size_t length)
{
	struct merge *merge = &core->merge;
	const uint8_t *first = merge->first;
	uint32_t header = merge->header, payload = (uint32_t)length - header;
	uint16_t step;

	if (merge->closed || length <= header || payload > merge->size || merge->count == MERGED
	    || header + merge->payload + payload > PACKET || mergeable(core, packet, length) != header
	    || !alike(first, packet, header))
		return 0;
	step = (uint16_t)(get16(packet + 4) - get16(first + 4));
	if (merge->count == 1)
		merge->id_step = step || !(first[6] & 0x40);
	if (step != (uint16_t)(merge->id_step * merge->count))
		return 0;
	if (first[9] == IPPROTO_TCP && get32(packet + 24) != get32(first + 24) + merge->payload)
		return 0;
	if (!merge->verified && !verified(first, header + merge->size))
		return 0;
	merge->verified = 1;
	if (!verified(packet, length))
		return 0;
	if (first[9] == IPPROTO_TCP)
		merge->flags |= packet[33];
	merge->iov[++merge->count] = (struct iovec){(void *)(packet + header), payload};
	merge->payload += payload;
	merge->closed = payload < merge->size || merge->flags & (FIN | PSH);
	return 1;
}

/* Complete what is in the making: fills `iov`, returns how many pieces of it are to be written. */
uint32_t merge_finish(struct merge *merge)
{
	uint8_t *head = merge->head, *packet = head + VNET;
	struct vnet vnet = {0};
	uint32_t header = merge->header, length = header + merge->payload, check;

	if (merge->count > 1) {
		memcpy(packet, merge->first, header);
		put16(packet + 2, length);
		ip_checksum(packet, 20);
		if (packet[9] == IPPROTO_TCP) {
			packet[33] = merge->flags;
			vnet = (struct vnet){NEEDS_CSUM, GSO_TCPV4, 0, 0, 20, 16};
		} else {
			put16(packet + 24, length - 20);
			vnet = (struct vnet){NEEDS_CSUM, GSO_UDP_L4, 0, 0, 20, 6};
		}
		vnet.hdr_len = (uint16_t)header;
		vnet.gso_size = (uint16_t)merge->size;
		check = 20u + vnet.csum_offset;
		put_sum(packet + check, fold(pseudo(packet, length - 20)));
		merge->iov[1] = (struct iovec){(void *)(merge->first + header), merge->size};
	}
	memcpy(head, &vnet, VNET);
	merge->iov[0] = (struct iovec){head, merge->count > 1 ? VNET + header : VNET};
	return merge->count + 1;
}
