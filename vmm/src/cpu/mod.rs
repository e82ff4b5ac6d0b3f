//! Virtual CPUs: what they can do ([`cpuid`]), how they start ([`regs`]), how they run and stop ([`vcpu`]).

pub(crate) mod cpuid;
pub(crate) mod regs;
pub(crate) mod vcpu;
