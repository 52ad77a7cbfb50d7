//! `alluvium health`: whether the process on this machine is ready, for containers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use alluvium_protocol::{Code, Error, Result};

use crate::cli::Role;
use crate::cluster::required;
use crate::config;
use crate::printer::{self, Exit};

/// A healthy process answers in milliseconds.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Carries out `health`.
pub(crate) async fn health(file: Option<&Path>, role: Role) -> Result<Exit> {
    let config = config::load(file)?;
    let listen = match role {
        Role::Coordinator => required(&config)?.listen,
        Role::Worker => config.listen.ok_or_else(|| {
            Error::new(Code::ConfigInvalid, "worker.listen is not set: a worker serves nothing")
                .with_help("set `listen = \"127.0.0.1:8461\"` in [worker]")
        })?,
    };
    let url = format!("http://{}/readyz", reachable(listen));
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build();
    let answer = client.map_err(Error::internal)?.get(&url).send().await;
    let (is_ready, said) = match answer {
        Ok(answer) => {
            let is_ready = answer.status().is_success();
            (is_ready, answer.text().await.unwrap_or_default())
        }
        Err(error) => (false, format!("{url} does not answer: {error}")),
    };
    printer::say(said.trim());
    Ok(if is_ready { Exit::Ok } else { Exit::Unhealthy })
}

/// Who listens everywhere is reached on this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
