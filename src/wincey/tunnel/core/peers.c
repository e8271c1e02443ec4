/* Which host has an inner address: longest prefix first, one probe of a hash table for each prefix length in use. */
#include "core.h"

#include <errno.h>
#include <stdlib.h>

static uint32_t hash(uint32_t address, uint32_t salt)
{
	uint64_t mixed = (uint64_t)(address ^ salt * 0x9e3779b9u) * 0x9e3779b97f4a7c15u;

	return (uint32_t)(mixed >> 32);
}

static uint32_t netmask(unsigned length)
{
	return length ? htonl(~(uint32_t)0 << (32 - length)) : 0;
}

void peers_free(struct peers *peers)
{
	free(peers->slots);
	free(peers->endpoints);
	free(peers->by_address);
	memset(peers, 0, sizeof *peers);
}

/* The index of a host, which is added if it is new. There is always a free place. */
static uint32_t host(struct peers *peers, uint32_t address)
{
	uint32_t at = hash(address, 0) & peers->address_mask;

	for (; peers->by_address[at]; at = (at + 1) & peers->address_mask)
		if (peers->endpoints[peers->by_address[at] - 1].address == address)
			return peers->by_address[at] - 1;
	peers->endpoints[peers->count] = (struct endpoint){.address = address, .limit = DATAGRAM};
	peers->by_address[at] = ++peers->count;
	return peers->count - 1;
}

/* Take the place of all peers. A record is 9 bytes: network, prefix length, host. Each network comes once (see
 * table.PeerTable, which keeps them). 0, or -ENOMEM, and then the peers are as before. */
int peers_set(struct peers *peers, const uint8_t *records, size_t count)
{
	struct peers made = {.mask = 1};
	uint64_t used = 0;

	while (made.mask < 2 * count)
		made.mask *= 2;
	made.address_mask = --made.mask;
	made.slots = calloc((size_t)made.mask + 1, sizeof *made.slots);
	made.by_address = calloc((size_t)made.mask + 1, sizeof *made.by_address);
	made.endpoints = calloc(count + 1, sizeof *made.endpoints);
	if (!made.slots || !made.by_address || !made.endpoints) {
		peers_free(&made);
		return -ENOMEM;
	}
	for (; count; count--, records += 9) {
		struct peer peer = {.length = records[4], .used = 1};
		uint32_t at, address;

		if (peer.length > 32)
			continue;
		memcpy(&peer.network, records, 4);
		memcpy(&address, records + 5, 4);
		peer.endpoint = host(&made, address);
		used |= (uint64_t)1 << peer.length;
		for (at = hash(peer.network, peer.length) & made.mask; made.slots[at].used; at = (at + 1) & made.mask)
			;
		made.slots[at] = peer;
	}
	for (int length = 32; length >= 0; length--)
		if (used >> length & 1)
			made.length[made.lengths++] = (uint8_t)length;
	peers_free(peers);
	*peers = made;
	return 0;
}

/* The host that has an inner address, NULL when nobody has it. */
struct endpoint *peers_route(const struct peers *peers, uint32_t address)
{
	for (uint32_t level = 0; level < peers->lengths; level++) {
		uint8_t length = peers->length[level];
		uint32_t network = address & netmask(length), at = hash(network, length) & peers->mask;

		for (; peers->slots[at].used; at = (at + 1) & peers->mask)
			if (peers->slots[at].network == network && peers->slots[at].length == length)
				return &peers->endpoints[peers->slots[at].endpoint];
	}
	return NULL;
}

/* The host with an address of the underlay, NULL when no peer has it. */
struct endpoint *peers_host(const struct peers *peers, uint32_t address)
{
	uint32_t at;

	if (!peers->by_address)
		return NULL;
	for (at = hash(address, 0) & peers->address_mask; peers->by_address[at]; at = (at + 1) & peers->address_mask)
		if (peers->endpoints[peers->by_address[at] - 1].address == address)
			return &peers->endpoints[peers->by_address[at] - 1];
	return NULL;
}
