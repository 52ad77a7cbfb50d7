//! One connection to the broker, made again whenever somebody needs a channel and it is gone.

use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, Event};
use tokio::sync::Mutex;

use super::topology::Names;
use super::{RabbitSettings, failed};
use crate::retry::jitter;
use crate::{Code, Error, Result};

/// A dead peer is noticed after two of these. Lower ones make a busy broker look dead.
const HEARTBEAT_SECONDS: u16 = 10;
/// For TCP, TLS, the handshake and the declarations together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest pause between two tries to connect: a restarted broker is used soon.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// First pause.
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// How a connection is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    /// It is there.
    pub is_connected: bool,
    /// The broker takes nothing at the moment, and why (an alarm of memory or disk).
    pub blocked: Option<String>,
    /// Why the last try failed.
    pub error: Option<String>,
    /// Connections made so far.
    pub connections: u64,
}

/// One connection.
pub(super) struct Link {
    url: String,
    label: String,
    names: Names,
    current: Mutex<Option<Connection>>,
    state: Arc<StdMutex<LinkState>>,
}

impl Link {
    pub(super) fn new(settings: &RabbitSettings, purpose: &str, names: Names) -> Arc<Self> {
        Arc::new(Self {
            url: settings.url.clone(),
            label: format!("{} ({purpose})", settings.client),
            names,
            current: Mutex::new(None),
            state: Arc::default(),
        })
    }

    pub(super) fn state(&self) -> LinkState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut LinkState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A new channel, on a new connection when the old one cannot give one. What is ours on the
    /// broker is declared whenever a connection is made.
    pub(super) async fn channel(&self) -> Result<Channel> {
        let mut current = self.current.lock().await;
        if let Some(connection) = &*current
            && connection.status().connected()
            && let Ok(Ok(channel)) =
                tokio::time::timeout(CONNECT_TIMEOUT, connection.create_channel()).await
        {
            return Ok(channel);
        }
        *current = None;
        self.change(|state| state.is_connected = false);
        let made = match tokio::time::timeout(CONNECT_TIMEOUT, self.connect()).await {
            Ok(made) => made,
            Err(_) => Err(Error::new(Code::QueueFailed, "the broker does not answer in time")),
        };
        match made {
            Ok((connection, channel)) => {
                *current = Some(connection);
                Ok(channel)
            }
            Err(error) => {
                let is_news = self.state().error.as_ref() != Some(&error.message);
                if is_news {
                    tracing::warn!(
                        label = self.label,
                        error = error.message,
                        "cannot reach RabbitMQ; tries on"
                    );
                }
                self.change(|state| state.error = Some(error.message.clone()));
                Err(error)
            }
        }
    }

    /// Declares what is ours again: somebody found a part of it missing.
    pub(super) async fn declare(&self) -> Result<()> {
        let current = self.current.lock().await;
        match &*current {
            Some(connection) => self.names.declare(connection).await,
            None => Ok(()),
        }
    }

    async fn connect(&self) -> Result<(Connection, Channel)> {
        let mut uri: AMQPUri = self.url.parse().map_err(|e: String| {
            Error::new(Code::ConfigInvalid, format!("cluster.amqp is not an AMQP URL: {e}"))
        })?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let place = format!("connect to RabbitMQ at {}:{}", uri.authority.host, uri.authority.port);
        let properties =
            ConnectionProperties::default().with_connection_name(self.label.as_str().into());
        let connection =
            Connection::connect_uri(uri, properties).await.map_err(|e| failed(&place, &e))?;
        self.watch(&connection);
        self.names.declare(&connection).await?;
        let channel = connection.create_channel().await.map_err(|e| failed(&place, &e))?;
        self.change(|state| {
            *state = LinkState {
                is_connected: true,
                connections: state.connections + 1,
                ..LinkState::default()
            };
        });
        Ok((connection, channel))
    }

    /// Notes alarms and the end of a connection.
    fn watch(&self, connection: &Connection) {
        let mut events = Box::pin(connection.events_listener());
        let state = Arc::clone(&self.state);
        let label = self.label.clone();
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                match event {
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!(label, reason, "the broker takes no messages");
                        state.blocked = Some(reason);
                    }
                    Event::ConnectionUnblocked => state.blocked = None,
                    Event::Error(error) => {
                        tracing::warn!(label, %error, "lost the connection to the broker");
                        state.is_connected = false;
                        state.error = Some(error.to_string());
                        return;
                    }
                    _ => {}
                }
            }
        });
    }
}

/// Pauses between tries to connect: full jitter below a doubling step.
#[derive(Default)]
pub(super) struct Pauses {
    tries: u32,
}

impl Pauses {
    pub(super) fn reset(&mut self) {
        self.tries = 0;
    }

    pub(super) async fn wait(&mut self) {
        let step = PAUSE_FIRST.saturating_mul(1 << self.tries.min(8)).min(PAUSE_MAX);
        self.tries += 1;
        tokio::time::sleep(jitter(step)).await;
    }
}
