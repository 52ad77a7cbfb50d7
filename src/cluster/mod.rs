//! The cluster's roles, and what they share: connections, names, how a process is.

pub(crate) mod coordinator;
mod leading;
pub(crate) mod listening;
mod surroundings;
pub(crate) mod vitals;
pub(crate) mod worker;

use std::sync::OnceLock;
use std::time::Duration;

use alluvium_protocol::lease::redis::RedisLeases;
use alluvium_protocol::queue::rabbit::{RabbitQueue, RabbitSettings, start_runtime};
use alluvium_protocol::{Code, Error, Result};
use alluvium_table::race::race;
use alluvium_table::store::{Place, place_of};
use tokio::runtime::Handle;

use crate::config::Config;
use crate::config::cluster::Cluster;

/// No step takes so long; the broker takes a task back after half as much again.
const LONGEST_TASK: Duration = Duration::from_secs(12 * 3600);

/// The runtime of connections, leases, heartbeats and traces: no work keeps it busy.
pub(crate) fn links() -> Result<Handle> {
    static LINKS: OnceLock<Handle> = OnceLock::new();
    if let Some(links) = LINKS.get() {
        return Ok(links.clone());
    }
    let made = start_runtime()?;
    Ok(LINKS.get_or_init(|| made).clone())
}

/// Unique among living processes of a cluster.
pub(crate) fn process_name() -> String {
    format!("{}-{}", host(), std::process::id())
}

fn host() -> String {
    let name =
        std::env::var("HOSTNAME").ok().or_else(|| std::fs::read_to_string("/etc/hostname").ok());
    name.map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "local".to_owned())
}

/// What a role connects to.
#[derive(Clone)]
pub(crate) struct Services {
    pub(crate) queue: RabbitQueue,
    pub(crate) leases: RedisLeases,
    pub(crate) links: Handle,
    pub(crate) name: String,
}

impl Services {
    pub(crate) fn of(cluster: &Cluster, role: &str) -> Result<Self> {
        let links = links()?;
        let name = process_name();
        let settings = RabbitSettings {
            url: cluster.amqp.clone(),
            name: cluster.name.clone(),
            client: format!("alluvium {role} {name}"),
            longest_task: LONGEST_TASK,
        };
        let queue = RabbitQueue::new(&settings, links.clone());
        let leases = RedisLeases::new(&cluster.redis, &cluster.name, links.clone())?;
        Ok(Self { queue, leases, links, name })
    }
}

/// The configuration's cluster; without one a role has nothing to connect to.
pub(crate) fn required(config: &Config) -> Result<&Cluster> {
    config.cluster.as_ref().ok_or_else(|| {
        let text = format!("{} has no section [cluster]", config.file.display());
        Error::new(Code::ConfigInvalid, text).with_help(
            "add [cluster] with `amqp` and `redis`; or run everything in one process: `alluvium run`",
        )
    })
}

/// One location for each bucket or disk that commits go to.
pub(crate) fn storage_roots(config: &Config) -> Vec<String> {
    let mut seen = Vec::new();
    let mut roots = Vec::new();
    let tables = config.pipelines.iter().flat_map(|p| [&p.main, &p.raw, &p.quarantine]);
    for uri in std::iter::once(&config.state).chain(tables) {
        let root = match place_of(uri) {
            Ok(Place::Remote(url)) => url.host_str().unwrap_or_default().to_owned(),
            Ok(Place::Local(_)) => "this machine".to_owned(),
            Err(_) => continue,
        };
        if !seen.contains(&root) {
            seen.push(root);
            roots.push(uri.clone());
        }
    }
    roots
}

/// What a role needs before it begins: storage that commits can rest on, and a name that is ours.
pub(crate) async fn prepare(config: &Config, services: &Services) -> Result<()> {
    check_storage(config).await?;
    // Redis does not answer: whoever comes later finds out.
    let Ok(owner) = services.leases.belongs_to(&config.state).await else { return Ok(()) };
    if owner == config.state {
        return Ok(());
    }
    let text =
        format!("processes of another configuration use this cluster.name: their state is {owner}");
    Err(Error::new(Code::NotPossibleNow, text)
        .with_help("set another `name` in [cluster]; if state moved, stop them and wait a minute"))
}

/// Refuses storage on which two workers could overwrite each other's commits.
async fn check_storage(config: &Config) -> Result<()> {
    for uri in storage_roots(config) {
        race(&uri).await?;
    }
    Ok(())
}
