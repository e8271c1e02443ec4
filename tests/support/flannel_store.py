"""How flannel reads and writes etcd: v3 as today (compatibility reference, 3.5), v2 as up to 0.17 (3.4). For the stand-in.

Both know `read`, `leases`, `create`, `put`, `delete` and `wait`, which returns when something below `subnets` has changed,
or after some seconds. v3 goes through etcdctl, v2 is plain HTTP.
"""

import base64
import http.client
import json
import os
import select
import subprocess
import urllib.parse

TTL = 86400


class StoreFailed(Exception):
    """The store did not do as it was asked."""


class EtcdV3:
    """Values are written with a lease of the store's own, and read with the prefix `<prefix>/subnets`, without a slash."""

    ipv6 = True

    def __init__(self, endpoints, prefix):
        self._argv = ("etcdctl", "--endpoints", endpoints)
        self._subnets = prefix + "/subnets"
        self._environment = os.environ | {"ETCDCTL_API": "3"}
        self._watch = None

    def read(self, key):
        return self._get(key).get(key)

    def leases(self):
        if self._watch is None:  # before the listing, so that no change falls between
            self._watch = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._argv, "watch", "--prefix", self._subnets],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self._environment,
            )  # fmt: skip
        return self._get("--prefix", self._subnets)

    def create(self, key, value):
        """Whether it was not there before."""
        lease = self._grant()
        transaction = f'ver("{key}") = "0"\n\nput --lease={lease} {key} {json.dumps(value)}\n\n\n'
        if "SUCCESS" in self._run("txn", text=transaction):
            return True
        self._run("lease", "revoke", lease)
        return False

    def put(self, key, value):
        self._run("put", f"--lease={self._grant()}", key, value)

    def delete(self, key):
        self._run("del", key)

    def wait(self, seconds):
        ready, _, _ = select.select([self._watch.stdout], [], [], seconds)
        if ready and not os.read(self._watch.stdout.fileno(), 1 << 20):
            self._watch.wait()
            self._watch = None
            raise StoreFailed("the watch ended")

    def close(self):
        if self._watch:
            self._watch.kill()
            self._watch.wait()

    def _get(self, *key):
        answer = json.loads(self._run("get", *key, "-w", "json"))
        return {
            base64.b64decode(each["key"]).decode(): base64.b64decode(each.get("value", "")).decode(errors="replace")
            for each in answer.get("kvs", [])
        }

    def _grant(self):
        return self._run("lease", "grant", str(TTL)).split()[1]

    def _run(self, *words, text=None):
        done = subprocess.run(
            [*self._argv, *words],
            input=text, capture_output=True, text=True, timeout=20, check=False, env=self._environment,
        )  # fmt: skip
        if done.returncode:
            raise StoreFailed(f"etcdctl {words[0]}: {done.stderr.strip()}")
        return done.stdout


class EtcdV2:
    """TTL 86400 on each lease; watched by long polls, one event each."""

    ipv6 = False

    def __init__(self, endpoints, prefix):
        self._endpoint = urllib.parse.urlsplit(endpoints.split(",")[0]).netloc
        self._subnets = prefix + "/subnets"
        self._cursor = 0

    def read(self, key):
        code, answer, _ = self._request("GET", key, "?quorum=false&recursive=false&sorted=false")
        return answer["node"]["value"] if code == 200 else None

    def leases(self):
        code, answer, headers = self._request("GET", self._subnets, "?quorum=false&recursive=true&sorted=false")
        if code == 404 and answer.get("errorCode") == 100:
            self._cursor = answer["index"]
            return {}
        if code != 200:
            raise StoreFailed(f"{code} {answer}")
        self._cursor = int(headers["X-Etcd-Index"])
        return {node["key"]: node.get("value", "") for node in answer["node"].get("nodes", [])}

    def create(self, key, value):
        """Whether it was not there before."""
        code, answer, _ = self._request("PUT", key, "?prevExist=false", {"ttl": TTL, "value": value})
        if code != 201 and answer.get("errorCode") != 105:
            raise StoreFailed(f"{code} {answer}")
        return code == 201

    def put(self, key, value):
        code, answer, _ = self._request("PUT", key, "", {"ttl": TTL, "value": value})
        if code not in (200, 201):
            raise StoreFailed(f"{code} {answer}")

    def delete(self, key):
        self._request("DELETE", key)

    def wait(self, seconds):
        try:
            self._request(
                "GET", self._subnets, f"?recursive=true&wait=true&waitIndex={self._cursor + 1}", None, seconds
            )
        except TimeoutError:
            return

    def close(self):
        pass

    def _request(self, method, key, query="", form=None, timeout=20):
        connection = http.client.HTTPConnection(self._endpoint, timeout=timeout)
        try:
            body = urllib.parse.urlencode(form) if form else None
            headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
            connection.request(method, f"/v2/keys{urllib.parse.quote(key)}{query}", body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"{}"), answer.headers
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StoreFailed(f"{method} {key}: {error}") from None
        finally:
            connection.close()
