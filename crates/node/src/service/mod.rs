//! What a node does when it is asked: the operations behind its API, each kind with its owner.

pub(crate) mod clones;
pub(crate) mod details;
pub(crate) mod idle;
pub(crate) mod images;
pub(crate) mod origins;
pub(crate) mod qcow2;
pub(crate) mod vms;
