"""A service without a process of its own: controller, hosts and frontends are actors that outlive whoever deployed them."""

from moeserve.deployment.deploy import Deployer
from moeserve.deployment.program import Deployed

__all__ = ["Deployed", "Deployer"]
