//! Moving VMs from node to node, running or not.
//!
//! An administrator tells the node that the VM goes to whom to take it from ([`target`]), and then the node that has
//! it to move it ([`source`]). What the VM wrote is carried as a clone's is, so that the target reads it at once and
//! has all of it after a while. So is each of its snapshots, of which the target takes over what the one below it has
//! not. What is written meanwhile follows in rounds, block by block, and the guest's memory is QEMU's business
//! ([`wire`] brings both).
//!
//! Consistency: at each moment the VM belongs to one node. It is the source's until that has written down that it is
//! the target's, which it does when the target has written down that it has everything. The guest stands still on both
//! sides then, and goes on at the one that it belongs to. Both records survive crashes:
//!
//! | what fails | who has the VM |
//! |---|---|
//! | anything, before the source has written it down | the source; the guest goes on there, the target forgets it |
//! | the target, after that | the target, when it is back; the source asks it to take over until it does |
//! | the source, after that | the target, once one of the two has reached the other |
//!
//! Retries: before the source gives the VM up, none: it keeps it. After that for ever. Cancellation: the whole is
//! carried out whether or not the client that asked stays. Bounds: those of a migration of the VM runner, and
//! [`source::ROUNDS_MAX`].

mod source;
mod target;
mod wire;

pub(super) use self::source::hand_over_moved;
pub(super) use self::target::{IncomingRecord, IncomingVms, Phase, RECORD, end_guest, on_move};
