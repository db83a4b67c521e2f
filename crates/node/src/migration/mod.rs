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

pub(crate) mod source;
pub(crate) mod target;
mod wire;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use self::target::Stream;
use crate::state::Layout;
use crate::vms::Member;
use control::http::{Client, Target};
use identity::tls::{self, Alpn, Expected};
use identity::{Credentials, Principal};

/// What the other node may take for one step: it may have to start a hypervisor.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// Speaks to other nodes in the name of this one.
#[derive(Clone)]
pub(crate) struct Peers {
    credentials: Arc<Credentials>,
}

impl Peers {
    /// With this node's certificate.
    pub(crate) fn new(credentials: Arc<Credentials>) -> Peers {
        Peers { credentials }
    }

    /// A client of a node's API.
    fn client_of(&self, member: &Member) -> Client {
        let (address, principal) = (member.address.clone(), Principal::Node(member.node.clone()));
        let credentials = Arc::clone(&self.credentials);
        Client::new(Target::Tls { address, principal, credentials }).with_answer_time_max(STEP_TIMEOUT)
    }

    /// A connection that brings a VM to a node.
    async fn connect(&self, member: &Member) -> io::Result<impl Stream + Unpin + use<>> {
        let principal = Principal::Node(member.node.clone());
        let expected = Expected::Member { credentials: Arc::clone(&self.credentials), principal };
        tls::connect(&member.address, &expected, Alpn::Move).await.map_err(io::Error::other)
    }
}

/// Notes that a step of a move was reached, for tests that end the daemon there.
fn reached(layout: &Layout, step: &str) {
    #[cfg(feature = "faults")]
    crate::fault::reached(layout.dir(), step);
    tracing::debug!(dir = %layout.dir().display(), step, "reached");
}
