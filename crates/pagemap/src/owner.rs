//! Who may map whose device pages in place: `drm_pagemap_acquire_owner`.
//!
//! ```text
//!   interconnect:  a---b   c      owners:  { a b }  { c }
//!                   \ /                    d joins { a b }: it reaches both
//!                    d
//! ```
//!
//! Peers that all reach each other share one owner, a *clique*. A page of a device is mapped in place
//! by devices of its owner; for all others it comes home.

use alloc::vec::Vec;
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::OwnerId;

/// A device, as others know it (`drm_pagemap_peer`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(pub u32);

/// All cliques (`drm_pagemap_owner_list`).
#[derive(Debug, Default)]
pub struct OwnerList(Mutex<Cliques>);

#[derive(Debug, Default)]
struct Cliques {
    cliques: Vec<(OwnerId, Vec<Peer>)>,
    next: u32,
}

/// A peer's membership of a clique. Dropping it leaves the clique (`drm_pagemap_release_owner`).
#[derive(Debug)]
pub struct Owner {
    list: Arc<OwnerList>,
    id: OwnerId,
    peer: Peer,
}

impl OwnerList {
    /// No peer yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The owner for `peer`: that of a clique all of whose members it has an interconnect with, or a
    /// new one. `has_interconnect` must be symmetric, and must not call back.
    pub fn acquire(
        self: &Arc<Self>,
        peer: Peer,
        has_interconnect: impl Fn(Peer, Peer) -> bool,
    ) -> Owner {
        let mut all = self.0.lock();
        let reaches_all =
            |members: &[Peer]| members.iter().all(|other| has_interconnect(peer, *other));
        let joined = all
            .cliques
            .iter_mut()
            .find(|(_, members)| reaches_all(members));
        let id = match joined {
            Some((id, members)) => {
                members.push(peer);
                *id
            }
            None => {
                let id = OwnerId(all.next);
                all.next += 1;
                all.cliques.push((id, [peer].into()));
                id
            }
        };
        Owner {
            list: Arc::clone(self),
            id,
            peer,
        }
    }
}

impl Owner {
    /// The clique.
    pub fn id(&self) -> OwnerId {
        self.id
    }

    /// The member.
    pub fn peer(&self) -> Peer {
        self.peer
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut all = self.list.0.lock();
        for (id, members) in &mut all.cliques {
            if *id == self.id
                && let Some(at) = members.iter().position(|member| *member == self.peer)
            {
                members.swap_remove(at);
            }
        }
        // An owner without members is never given out again: somebody may still compare with it.
        all.cliques.retain(|(_, members)| !members.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_that_all_reach_each_other_share_an_owner() {
        let links = [(0, 1), (0, 3), (1, 3), (2, 3)];
        let linked = |a: Peer, b: Peer| links.contains(&(a.0, b.0)) || links.contains(&(b.0, a.0));
        let list = OwnerList::new();
        let [a, b, c, d] = [0, 1, 2, 3].map(|peer| list.acquire(Peer(peer), linked));
        assert_eq!(
            (a.id(), a.id()),
            (b.id(), d.id()),
            "a, b and d are a clique"
        );
        assert_ne!(c.id(), a.id(), "c reaches d, but not a and b");
    }

    #[test]
    fn an_owner_is_not_given_out_again() {
        let list = OwnerList::new();
        let first = list.acquire(Peer(1), |_, _| true);
        let id = first.id();
        drop(first);
        assert_ne!(list.acquire(Peer(1), |_, _| true).id(), id);
    }

    #[test]
    fn who_left_is_not_asked_about() {
        let list = OwnerList::new();
        let first = list.acquire(Peer(1), |_, _| false);
        let second = list.acquire(Peer(2), |_, _| true);
        drop(first);
        let third = list.acquire(Peer(3), |_, other| other == Peer(2));
        assert_eq!(third.id(), second.id());
    }
}
