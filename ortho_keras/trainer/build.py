"""What a recipe describes as a Keras model: its network and its optimizer."""

import keras

from ortho_keras.method.chain import modulate
from ortho_keras.method.orthonormalize import orthonormalize
from ortho_keras.method.regularizers import REGULARIZERS
from ortho_keras.nets.networks import plain_cnn, plain_imagenet, residual_cnn, residual_imagenet
from ortho_keras.trainer.optimizers import AllReplicaLossScaleOptimizer, LearningRate, Muon

BUILDERS = {
    ("cifar", "plain"): plain_cnn,
    ("cifar", "residual"): residual_cnn,
    ("imagenet", "plain"): plain_imagenet,
    ("imagenet", "residual"): residual_imagenet,
}


def build_model(recipe, data, replicated=False):
    """Returns the recipe's network on raw pixels (0 to 255), modulated if the recipe says so; not compiled.

    `replicated` says that there is more than one replica, so that there is something to synchronize.
    """
    mean, variance = data.channel_statistics
    model = BUILDERS[recipe.family, recipe.network](
        recipe.depth,
        input_shape=data.image_shape,
        num_classes=len(data.class_names),
        width=recipe.width,
        # Keras's L2(x) is x * ||W||^2; weight decay of strength `factor` is factor / 2 * ||W||^2.
        regularizer=keras.regularizers.L2(recipe.factor / 2) if recipe.regularizer == "l2" else None,
        initializer=recipe.initializer,
        relu_shift="auto" if recipe.relu_shift < 0 else recipe.relu_shift,
        bn_synchronized=replicated and recipe.bn_sync,
        seed=recipe.seed,
        preprocessing=keras.layers.Normalization(mean=mean, variance=variance, name="normalization"),
    )
    if recipe.regularizer in REGULARIZERS:
        orthonormalize(model, recipe.factor, verbose=False, regularizer=recipe.regularizer)
    if recipe.modulation == "off":
        return model
    # The classifier's error is not commensurable with the convolutions': global pooling lies between (see `modulate`).
    convolutions = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    return modulate(
        model,
        recipe.tolerance,
        recipe.max_scale,
        recipe.modulation,
        synchronized=replicated and recipe.modulation_sync,
        layers=convolutions,
    )


def compiled_model(recipe, data, replicated=False):
    """Returns the recipe's compiled model and its number of training steps; to be called in the strategy's scope."""
    total_steps = recipe.epochs * (len(data.train) // recipe.batch_size)
    if recipe.max_steps:
        total_steps = min(total_steps, recipe.max_steps)
    model = build_model(recipe, data, replicated)
    model.compile(
        optimizer=make_optimizer(recipe, total_steps, growth_step(recipe, data)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="crossentropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
    )
    return model, total_steps


def make_optimizer(recipe, total_steps, first_step=0):
    """Returns the recipe's optimizer with its learning-rate schedule over `total_steps`, from `first_step` on."""
    schedule = LearningRate(recipe.peak_learning_rate, total_steps, recipe.schedule, recipe.warmup_steps, first_step)
    makers = {
        "sgd": lambda: keras.optimizers.SGD(schedule, recipe.momentum),
        "nesterov": lambda: keras.optimizers.SGD(schedule, recipe.momentum, nesterov=True),
        "muon": lambda: Muon(schedule, recipe.momentum, recipe.vector_rate),
        "adagrad": lambda: keras.optimizers.Adagrad(schedule),
        "adadelta": lambda: keras.optimizers.Adadelta(schedule),
        "rmsprop": lambda: keras.optimizers.RMSprop(schedule, momentum=recipe.momentum),
        "adam": lambda: keras.optimizers.Adam(schedule),
        "adamw": lambda: keras.optimizers.AdamW(schedule, weight_decay=recipe.weight_decay),
    }
    optimizer = makers[recipe.optimizer]()
    if recipe.precision == "mixed_float16":
        optimizer = AllReplicaLossScaleOptimizer(optimizer)
    optimizer.first_step = first_step
    return optimizer


def growth_step(recipe, data):
    """The step after which the recipe's net grows; 0 where it does not."""
    return recipe.grow_epoch * (len(data.train) // recipe.batch_size) if recipe.start_depth else 0
