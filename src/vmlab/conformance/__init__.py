"""The suite that every hypervisor must pass, shipped with the package.

Capability-driven: it proves what a back end declares, reports what works undeclared, and says of
everything that it skipped why. It uses the contract (`vmlab.hypervisors.base`) and the guest's own
view (`vmlab.conformance.probe`) and nothing else of a back end. `vmlab conformance NAME` runs it.
"""
