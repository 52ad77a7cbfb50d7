//! The command line's side of the coordinator's HTTP API.
//!
//! Without a `[cluster]` there is nobody to ask, and verbs look at the tables themselves. They do so,
//! too, when the coordinator does not answer: that is told, and is no error.

use std::time::Duration;

use alluvium_coordinator::api::{Asked, IDENTITY_HEADER, identity};
use alluvium_protocol::{Code, Error, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::Config;
use crate::config::cluster::Cluster;
use crate::printer;

/// A coordinator on this machine answers in milliseconds; a far one in a second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longer than the coordinator itself waits for its loop, or watches an act.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);

/// The items of one of the API's lists; `None`: there is no coordinator to ask.
pub(crate) async fn items(
    config: &Config,
    list: &str,
    filter: &[(&str, Option<String>)],
) -> Result<Option<Vec<Value>>> {
    let Some(cluster) = &config.cluster else { return Ok(None) };
    let mut url = url_of(cluster, list)?;
    for (name, value) in filter {
        if let Some(value) = value {
            url.query_pairs_mut().append_pair(name, value);
        }
    }
    match answer(config, cluster, http()?.get(url)).await {
        Ok(mut found) => match found["items"].take() {
            Value::Array(items) => Ok(Some(items)),
            _ => Err(Error::internal(format!("{list}: the coordinator gave no items"))),
        },
        Err(error) if error.code == Code::CoordinatorUnreachable => {
            printer::say(&format!("looking at the tables themselves: {}", error.message));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The same as values of a type.
pub(crate) async fn typed<T: DeserializeOwned>(
    config: &Config,
    list: &str,
    filter: &[(&str, Option<String>)],
) -> Result<Option<Vec<T>>> {
    let Some(items) = items(config, list, filter).await? else { return Ok(None) };
    let typed = items.into_iter().map(serde_json::from_value).collect::<Result<Vec<T>, _>>();
    typed.map(Some).map_err(|e| {
        Error::new(
            Code::MessageUnknown,
            format!("{list}: the coordinator is of another version: {e}"),
        )
    })
}

/// Asks the coordinator to do something. Returns what became of it.
pub(crate) async fn ask(config: &Config, cluster: &Cluster, asked: &Asked) -> Result<String> {
    let mut request = http()?.post(url_of(cluster, "requests")?).json(asked);
    if let Some(token) = &cluster.token {
        request = request.bearer_auth(token);
    }
    let found = answer(config, cluster, request).await?;
    Ok(found["outcome"].as_str().unwrap_or("asked").to_owned())
}

fn url_of(cluster: &Cluster, list: &str) -> Result<reqwest::Url> {
    let text = format!("{}/api/v1/{list}", cluster.api);
    text.parse().map_err(|e| Error::new(Code::ConfigInvalid, format!("cluster.api: {text}: {e}")))
}

fn http() -> Result<reqwest::Client> {
    let client = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(ANSWER_TIMEOUT)
        .no_proxy()
        .build();
    client.map_err(Error::internal)
}

async fn answer(
    config: &Config,
    cluster: &Cluster,
    request: reqwest::RequestBuilder,
) -> Result<Value> {
    let request = request.header(IDENTITY_HEADER, identity(&cluster.name, &config.state));
    let unreachable = |why: String| {
        let text = format!("no coordinator answers at {}: {why}", cluster.api);
        Error::new(Code::CoordinatorUnreachable, text)
            .with_help("start one with `alluvium coordinator`, or look with `alluvium doctor`")
    };
    let response = match request.send().await {
        Ok(response) => response,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            return Err(unreachable(cause.unwrap_or_else(|| error.to_string())));
        }
    };
    let status = response.status();
    let body: Value = match response.json().await {
        Ok(body) => body,
        Err(error) => return Err(unreachable(format!("{status}, {error}"))),
    };
    if status.is_success() {
        return Ok(body);
    }
    match serde_json::from_value::<Error>(body["error"].clone()) {
        Ok(error) => Err(error),
        Err(_) => Err(unreachable(format!("{status}"))),
    }
}
