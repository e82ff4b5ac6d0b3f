//! CPUID as the guest sees it: what KVM supports, minus what this VMM does not offer, plus the topology.
//!
//! Topology: one socket, one die, one thread per core, the local APIC's id is the CPU's index. Each leaf that tells about it
//! (1, 4, 0xb, 0x1f of Intel; 0x8000_0008, 0x8000_001d, 0x8000_001e of AMD) says the same.

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Where a CPU is in the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Topology {
    /// Index of the CPU, also its APIC id.
    pub(crate) index: u8,
    /// CPUs in the machine.
    pub(crate) count: u8,
}

impl Topology {
    /// Bits of the APIC id that number the cores of the socket.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

const EXTENDED_TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// Leaves that describe hardware which the guest does not get: monitoring, thermal sensors (but for the always running
/// APIC timer), performance counters, resource director, SGX, processor trace, nested virtualisation.
const HIDDEN_LEAVES: [u32; 9] = [
    0x5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1b,
    0x8000_000a,
    0x8000_0022,
];

/// Makes the CPUID of one CPU from what KVM supports.
///
/// # Errors
/// KVM's list is longer than KVM's own maximum.
pub(crate) fn for_cpu(supported: &CpuId, topology: Topology) -> Result<CpuId> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !EXTENDED_TOPOLOGY.contains(&entry.function))
        .copied()
        .collect();
    let max_leaf = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        adjust(entry, topology);
    }
    for leaf in EXTENDED_TOPOLOGY
        .into_iter()
        .filter(|leaf| *leaf <= max_leaf.max(0xb))
    {
        entries.extend(extended_topology(leaf, topology));
    }
    CpuId::from_entries(&entries).context("CPUID list")
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    const ALWAYS_RUNNING_APIC_TIMER: u32 = 1 << 2;
    match entry.function {
        0 => entry.eax = entry.eax.max(0xb),
        1 => features(entry, topology),
        4 => {
            cache_sharing(entry, topology);
            cores_per_socket(entry, topology);
        }
        6 => {
            *entry = kvm_cpuid_entry2 {
                function: 6,
                eax: entry.eax & ALWAYS_RUNNING_APIC_TIMER,
                ..Default::default()
            }
        }
        7 if entry.index == 0 => {
            const SGX: u32 = 1 << 2;
            const PROCESSOR_TRACE: u32 = 1 << 25;
            const SGX_LAUNCH: u32 = 1 << 30;
            entry.ebx &= !(SGX | PROCESSOR_TRACE);
            entry.ecx &= !SGX_LAUNCH;
        }
        0x8000_0001 => {
            const SVM: u32 = 1 << 2;
            const PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
            entry.ecx &= !(SVM | PERFORMANCE_COUNTERS);
        }
        0x8000_0008 => {
            let cores = u32::from(topology.count) - 1;
            entry.ecx = entry.ecx & !0xf0ff | cores | topology.core_bits() << 12;
        }
        0x8000_001d => cache_sharing(entry, topology),
        0x8000_001e => {
            let index = u32::from(topology.index);
            (entry.eax, entry.ebx, entry.ecx) = (index, index, 0);
        }
        leaf if HIDDEN_LEAVES.contains(&leaf) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Leaf 1: the CPU's own APIC id, the number of logical CPUs, and features.
fn features(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    const DEBUG_STORE_64: u32 = 1 << 2;
    const MONITOR: u32 = 1 << 3;
    const VMX: u32 = 1 << 5;
    const PERFORMANCE_CAPABILITIES: u32 = 1 << 15;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HYPER_THREADING: u32 = 1 << 28;
    let index = u32::from(topology.index);
    let logical = 1 << topology.core_bits().min(7);
    entry.ebx = entry.ebx & 0xffff | logical << 16 | index << 24;
    entry.ecx &= !(DEBUG_STORE_64 | MONITOR | VMX | PERFORMANCE_CAPABILITIES);
    entry.ecx |= TSC_DEADLINE | HYPERVISOR;
    entry.edx &= !HYPER_THREADING;
    if topology.count > 1 {
        entry.edx |= HYPER_THREADING;
    }
}

/// Whether a subleaf of a cache leaf describes a cache, not the end of the list.
fn is_cache(entry: &kvm_cpuid_entry2) -> bool {
    entry.eax & 0x1f != 0
}

/// Leaves 4 (Intel) and 0x8000_001d (AMD): the last level cache is shared by all cores, the others are each core's own.
fn cache_sharing(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if is_cache(entry) {
        let level = entry.eax >> 5 & 7;
        let sharing = if level >= 3 {
            (1 << topology.core_bits()) - 1
        } else {
            0
        };
        entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
    }
}

/// Leaf 4: the socket's cores, in bits that leaf 0x8000_001d reserves.
fn cores_per_socket(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if is_cache(entry) {
        let cores: u32 = (1 << topology.core_bits()) - 1;
        entry.eax = entry.eax & 0x03ff_ffff | cores.min(0x3f) << 26;
    }
}

/// Leaves 0xb and 0x1f: level 0 is the thread, level 1 the core, level 2 ends the list.
fn extended_topology(leaf: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: u32::from(topology.index),
        ..Default::default()
    };
    [
        level(0, 0, 1, THREAD),
        level(1, topology.core_bits(), u32::from(topology.count), CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0xd, 0, 0, 0),
            leaf(1, 0, 0x0503_0800, 0xffff_ffff, 0xffff_ffff),
            leaf(4, 0x0400_0121, 0, 0, 0),
            leaf(4, 0x0400_0163, 0, 0, 0),
            leaf(0xa, 1, 2, 3, 4),
            leaf(0xb, 9, 9, 9, 9),
            leaf(0x8000_0001, 0, 0, 0xffff_ffff, 0),
            leaf(0x8000_0008, 0, 0, 0x7007, 0),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, nth: usize) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .filter(|entry| entry.function == function)
            .nth(nth)
            .unwrap()
    }

    #[test]
    fn every_topology_leaf_tells_the_same_story() {
        let cpuid = for_cpu(&supported(), Topology { index: 2, count: 3 }).unwrap();
        let leaf1 = find(&cpuid, 1, 0);
        assert_eq!((leaf1.ebx >> 24, leaf1.ebx >> 16 & 0xff), (2, 4));
        assert_eq!(
            find(&cpuid, 4, 0).eax >> 14,
            3 << 12,
            "an L1 cache is not shared"
        );
        assert_eq!(
            find(&cpuid, 4, 1).eax >> 14 & 0xfff,
            3,
            "an L3 cache is shared"
        );
        let core = find(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.edx), (2, 3, 2));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x1f));
    }

    #[test]
    fn virtualisation_and_counters_are_hidden_and_the_deadline_timer_is_shown() {
        let cpuid = for_cpu(&supported(), Topology { index: 0, count: 1 }).unwrap();
        let leaf1 = find(&cpuid, 1, 0);
        assert_eq!(leaf1.ecx & (1 << 5 | 1 << 3), 0);
        assert_eq!(leaf1.ecx >> 24 & 1, 1);
        assert_eq!(leaf1.edx >> 28 & 1, 0, "a single CPU is not multi-threaded");
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & 1 << 2, 0);
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
    }
}
