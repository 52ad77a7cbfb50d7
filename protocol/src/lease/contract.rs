//! The contract suite of the leases: every backend passes it, the in-process one first.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a contract suite fails by panicking")]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::{Claim, Leases};

const TTL: Duration = Duration::from_millis(400);

/// Leases under test, and how time passes for them (a real backend waits).
pub struct Fixture {
    /// The backend.
    pub leases: Arc<dyn Leases>,
    /// Lets time pass.
    pub pass: Box<dyn Fn(Duration) + Send + Sync>,
}

/// Runs the whole suite, each claim on leases that `fresh` makes.
pub async fn all<F, Made>(fresh: F)
where
    F: Fn() -> Made,
    Made: Future<Output = Fixture>,
{
    a_free_task_is_claimed_and_a_held_one_is_not(fresh().await).await;
    a_repeated_claim_keeps_its_fence(fresh().await).await;
    a_redelivery_takes_over_and_the_old_holder_learns_it(fresh().await).await;
    an_expired_lease_is_free_and_fences_grow(fresh().await).await;
    a_renewed_lease_lives_on(fresh().await).await;
    only_the_holder_releases(fresh().await).await;
    deaths_count_until_the_task_ends(fresh().await).await;
    who_survived_did_not_die(fresh().await).await;
    the_holder_is_known_while_its_lease_lives(fresh().await).await;
    tasks_do_not_touch_each_other(fresh().await).await;
}

async fn hold(fixture: &Fixture, task: Uuid, owner: &str, take_over: bool) -> u64 {
    match fixture.leases.claim(task, owner, TTL, take_over).await.unwrap() {
        Claim::Held { fence, .. } => fence,
        Claim::Taken { owner: holder, .. } => panic!("{owner} finds the task held by {holder}"),
    }
}

async fn is_taken(fixture: &Fixture, task: Uuid, owner: &str) -> bool {
    let claim = fixture.leases.claim(task, owner, TTL, false).await.unwrap();
    matches!(claim, Claim::Taken { .. })
}

async fn a_free_task_is_claimed_and_a_held_one_is_not(fixture: Fixture) {
    let task = Uuid::new_v4();
    hold(&fixture, task, "a", false).await;
    match fixture.leases.claim(task, "b", TTL, false).await.unwrap() {
        Claim::Taken { owner, remaining } => {
            assert_eq!(owner, "a");
            assert!(remaining <= TTL);
        }
        Claim::Held { .. } => panic!("two holders"),
    }
}

async fn a_repeated_claim_keeps_its_fence(fixture: Fixture) {
    let task = Uuid::new_v4();
    let fence = hold(&fixture, task, "a", false).await;
    assert_eq!(hold(&fixture, task, "a", false).await, fence);
}

async fn a_redelivery_takes_over_and_the_old_holder_learns_it(fixture: Fixture) {
    let task = Uuid::new_v4();
    let old = hold(&fixture, task, "a", false).await;
    let new = hold(&fixture, task, "b", true).await;
    assert!(new > old);
    assert!(!fixture.leases.renew(task, "a", old, TTL).await.unwrap());
    assert!(fixture.leases.renew(task, "b", new, TTL).await.unwrap());
}

async fn an_expired_lease_is_free_and_fences_grow(fixture: Fixture) {
    let task = Uuid::new_v4();
    let old = hold(&fixture, task, "a", false).await;
    (fixture.pass)(TTL * 2);
    assert!(!fixture.leases.renew(task, "a", old, TTL).await.unwrap());
    assert!(hold(&fixture, task, "b", false).await > old);
}

async fn a_renewed_lease_lives_on(fixture: Fixture) {
    let task = Uuid::new_v4();
    let fence = hold(&fixture, task, "a", false).await;
    for _ in 0..3 {
        (fixture.pass)(TTL / 2);
        assert!(fixture.leases.renew(task, "a", fence, TTL).await.unwrap());
    }
    assert!(is_taken(&fixture, task, "b").await);
}

async fn only_the_holder_releases(fixture: Fixture) {
    let task = Uuid::new_v4();
    let old = hold(&fixture, task, "a", false).await;
    let new = hold(&fixture, task, "b", true).await;
    fixture.leases.release(task, "a", old).await.unwrap();
    assert!(is_taken(&fixture, task, "c").await);
    fixture.leases.release(task, "b", new).await.unwrap();
    assert!(hold(&fixture, task, "c", false).await > new);
}

async fn deaths(fixture: &Fixture, task: Uuid, owner: &str) -> u32 {
    match fixture.leases.claim(task, owner, TTL, true).await.unwrap() {
        Claim::Held { deaths, .. } => deaths,
        Claim::Taken { .. } => panic!("a redelivery takes over"),
    }
}

async fn deaths_count_until_the_task_ends(fixture: Fixture) {
    let task = Uuid::new_v4();
    assert_eq!(deaths(&fixture, task, "a").await, 0);
    assert_eq!(deaths(&fixture, task, "a").await, 0);
    assert_eq!(deaths(&fixture, task, "b").await, 1);
    assert_eq!(deaths(&fixture, task, "c").await, 2);
    let fence = hold(&fixture, task, "c", false).await;
    fixture.leases.release(task, "c", fence).await.unwrap();
    assert_eq!(deaths(&fixture, task, "d").await, 0);
}

async fn who_survived_did_not_die(fixture: Fixture) {
    let task = Uuid::new_v4();
    fixture.leases.survived(task).await.unwrap();
    assert_eq!(deaths(&fixture, task, "a").await, 0);
    assert_eq!(deaths(&fixture, task, "b").await, 1);
    fixture.leases.survived(task).await.unwrap();
    assert_eq!(deaths(&fixture, task, "b").await, 0);
}

async fn the_holder_is_known_while_its_lease_lives(fixture: Fixture) {
    let task = Uuid::new_v4();
    assert_eq!(fixture.leases.holder(task).await.unwrap(), None);
    hold(&fixture, task, "a", false).await;
    assert_eq!(fixture.leases.holder(task).await.unwrap().as_deref(), Some("a"));
    (fixture.pass)(TTL * 2);
    assert_eq!(fixture.leases.holder(task).await.unwrap(), None);
}

async fn tasks_do_not_touch_each_other(fixture: Fixture) {
    hold(&fixture, Uuid::new_v4(), "a", false).await;
    hold(&fixture, Uuid::new_v4(), "b", false).await;
}
