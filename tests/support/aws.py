"""AWS on loopback: moto's server, and in front of it what moto lacks.

moto is a real implementation of EC2's API, with AWS's error codes. The front passes calls on to it, and

- answers a call with an error instead where a test says so (throttling, a denied permission, a wrong token);
- drops the connection before or after a call was passed on, as a network fault;
- shows a route as `blackhole` when its network interface is gone, as AWS does (moto: `active` for ever);
- enforces a quota of routes per table (moto: none), with AWS's error, and tells it through Service Quotas;
- is the instance metadata service of every host, at `/imds/INSTANCE`: version 2, or version 1 alone;
- keeps a list of the calls.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from botocore.config import Config

from support.server import free_port

REGION = "eu-west-1"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "test-secret-never-shown"}

_ERROR = (
    "<?xml version='1.0'?><Response><Errors><Error><Code>{}</Code><Message>{}</Message></Error></Errors>"
    "<RequestID>1</RequestID></Response>"
)


class Aws:
    """One running stage. faults: by action, a list of what happens to its next calls: (status, code, message), `drop`
    or `drop-after`; the last one stays when it is wrapped as ("always", fault)."""

    def __init__(self, port: int, moto_port: int) -> None:
        self.port, self._moto = port, moto_port
        self.calls: list[str] = []
        self.faults: dict[str, list[object]] = {}
        self.blackholes: set[str] = set()
        self.quota: int | None = None
        self.quota_visible = True
        self.imds_v2 = True
        config = Config(proxies={}, retries={"max_attempts": 0})
        keys = {"aws_access_key_id": "admin", "aws_secret_access_key": "admin", "region_name": REGION}
        # The administrator's own client: past the front, so that faults and the list of calls are the daemons' alone.
        self.admin = boto3.client("ec2", endpoint_url=f"http://127.0.0.1:{moto_port}", config=config, **keys)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, instance: str = "", *, keys: bool = True) -> dict[str, str]:
        """What a daemon on an instance (a server outside EC2: none) finds in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.url}/imds/{instance}",
            "AWS_EC2_METADATA_DISABLED": "true",  # for botocore's credentials, which the role would give
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
            **(CREDENTIALS if keys else {}),
            **({} if instance else {"AWS_REGION": REGION}),
        }

    def fail(self, action: str, *faults: object) -> None:
        self.faults[action] = list(faults)

    def fail_always(self, action: str, status: int, code: str, message: str = "no") -> None:
        self.faults[action] = [("always", (status, code, message))]

    def heal(self) -> None:
        self.faults.clear()

    def take_fault(self, action: str) -> object:
        waiting = self.faults.get(action)
        if not waiting:
            return None
        first = waiting[0]
        if isinstance(first, tuple) and first[0] == "always":
            return first[1]
        return waiting.pop(0)

    def network(self, hosts: int = 3, subnet: str = "10.99.0.0/16") -> Network:
        return Network(self, hosts, subnet)


class Network:
    """A VPC with one subnet and some instances, one address each from 10.99.0.1 on, as the lab's hosts have them."""

    def __init__(self, aws: Aws, hosts: int, subnet: str) -> None:
        self.aws, ec2 = aws, aws.admin
        self.vpc = ec2.create_vpc(CidrBlock=subnet)["Vpc"]["VpcId"]
        self.subnet = ec2.create_subnet(VpcId=self.vpc, CidrBlock=subnet)["Subnet"]["SubnetId"]
        found = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [self.vpc]}])
        self.main = found["RouteTables"][0]["RouteTableId"]
        self.instances: list[str] = []
        self.addresses: list[str] = []
        for number in range(1, hosts + 1):
            self.add(f"10.99.0.{number}")

    def add(self, address: str) -> str:
        image = "ami-12c6146b"
        made = self.aws.admin.run_instances(
            ImageId=image, MinCount=1, MaxCount=1, SubnetId=self.subnet, PrivateIpAddress=address
        )
        instance = made["Instances"][0]["InstanceId"]
        self.instances.append(instance)
        self.addresses.append(address)
        return instance

    def interface(self, instance: str) -> dict:
        found = self.aws.admin.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
        return found["NetworkInterfaces"][0]

    def forwards(self, instance: str) -> bool:
        eni = self.interface(instance)["NetworkInterfaceId"]
        shown = self.aws.admin.describe_network_interface_attribute(NetworkInterfaceId=eni, Attribute="sourceDestCheck")
        return not shown["SourceDestCheck"]["Value"]

    def routes(self, table: str | None = None) -> dict[str, str]:
        """Destination and interface, instance or gateway of each route but the local one."""
        found = self.aws.admin.describe_route_tables(RouteTableIds=[table or self.main])["RouteTables"][0]
        return {
            route["DestinationCidrBlock"]: route.get("NetworkInterfaceId")
            or route.get("InstanceId")
            or route.get("GatewayId")
            for route in found["Routes"]
            if route.get("GatewayId") != "local"
        }

    def hosts(self, table: str | None = None) -> dict[str, str]:
        """Destination and instance of each route to one of our instances."""
        by_interface = {self.interface(each)["NetworkInterfaceId"]: each for each in self.instances}
        return {to: by_interface[hop] for to, hop in self.routes(table).items() if hop in by_interface}

    def new_table(self) -> str:
        return self.aws.admin.create_route_table(VpcId=self.vpc)["RouteTable"]["RouteTableId"]


class _Front(BaseHTTPRequestHandler):
    aws: Aws
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._imds() if self.path.startswith("/imds/") else self._pass_on()

    def do_PUT(self) -> None:
        self._imds()

    def do_POST(self) -> None:
        self._pass_on()

    def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _imds(self) -> None:
        instance, _, path = self.path.removeprefix("/imds/").partition("/latest/")
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        token = f"token-of-{instance}"
        if not instance or (self.command == "PUT" and not self.aws.imds_v2):
            self._answer(404, b"")
        elif path == "api/token":
            asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            self._answer(200 if asked.isdigit() else 400, token.encode())
        elif self.aws.imds_v2 and self.headers.get("X-aws-ec2-metadata-token") != token:
            self._answer(401, b"")
        else:
            known = {
                "meta-data/instance-id": instance,
                "meta-data/placement/availability-zone": f"{REGION}a",
                **({"meta-data/placement/region": REGION} if self.aws.imds_v2 else {}),
            }
            found = known.get(path)
            self._answer(200 if found else 404, (found or "").encode())

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = self.headers.get("X-Amz-Target", "")
        fields = dict(urllib.parse.parse_qsl(body.decode())) if not target else {}
        action = fields.get("Action") or target.rpartition(".")[2]
        self.aws.calls.append(action)
        fault = self.aws.take_fault(action)
        if isinstance(fault, tuple):
            status, code, message = fault
            self._answer(status, _ERROR.format(code, message).encode(), "text/xml")
            return
        if fault == "drop":
            self.close_connection = True
            return
        if action == "GetServiceQuota":
            self._quota()
            return
        if action == "CreateRoute" and self.aws.quota is not None and self._full(fields["RouteTableId"]):
            self._answer(400, _ERROR.format("RouteLimitExceeded", "The maximum number of routes is reached").encode())
            return
        status, kind, answer = self._ask(body)
        if fault == "drop-after":
            self.close_connection = True
            return
        if action == "DescribeRouteTables":
            answer = self._with_blackholes(answer)
        self._answer(status, answer, kind)

    def _quota(self) -> None:
        if not self.aws.quota_visible or self.aws.quota is None:
            said = {"__type": "AccessDeniedException", "message": "not authorized to perform GetServiceQuota"}
            self._answer(400, json.dumps(said).encode(), "application/x-amz-json-1.1")
            return
        quota = {"Quota": {"QuotaCode": "L-93826ACB", "ServiceCode": "vpc", "Value": float(self.aws.quota)}}
        self._answer(200, json.dumps(quota).encode(), "application/x-amz-json-1.1")

    def _full(self, table: str) -> bool:
        found = self.aws.admin.describe_route_tables(RouteTableIds=[table])["RouteTables"][0]
        return len(found["Routes"]) >= self.aws.quota

    def _with_blackholes(self, answer: bytes) -> bytes:
        text = answer.decode()
        for interface in self.aws.blackholes:
            text = re.sub(
                rf"(<networkInterfaceId>{interface}</networkInterfaceId>(?:(?!</item>).)*?<state>)active",
                r"\1blackhole",
                text,
                flags=re.DOTALL,
            )
        return text.encode()

    def _ask(self, body: bytes) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.aws._moto, timeout=30)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in {"host", "connection"}}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type", "text/xml"), answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def aws_stage(directory: Path) -> Iterator[Aws]:
    """Start moto and the front; both end with the block."""
    moto_port = free_port()
    log = directory / "moto.log"
    argv = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(moto_port)]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        _wait_for(moto_port, process, log)
        front = ThreadingHTTPServer(("127.0.0.1", 0), type("Front", (_Front,), {}))
        front.daemon_threads = True
        aws = front.RequestHandlerClass.aws = Aws(front.server_address[1], moto_port)
        serving = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        try:
            yield aws
        finally:
            front.shutdown()
            serving.join()
            front.server_close()
            aws.admin.close()
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/moto-api/")
            connection.getresponse().read()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "moto did not start"
            time.sleep(0.1)
        finally:
            connection.close()
